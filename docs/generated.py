"""The tables that pages show of what was measured and tested: written by `conf.py` into docs/generated at each build.

python docs/generated.py
"""

from __future__ import annotations

import ast
import json
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FOLDER = ROOT / "docs" / "generated"
Row = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown, whose columns but the first are numbers.

    Example:
        >>> print(table(["method", "ms"], [["rk4", "1.0"]]))
        | method | ms |
        |---|--:|
        | rk4 | 1.0 |
    """
    lines = [header, *rows]
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([text[0], f"|---|{'--:|' * (len(header) - 1)}", *text[1:]])


def number(x: float | None) -> str:
    """A number as a reader wants it: two or three digits.

    Example:
        >>> number(1234.5), number(0.98765), number(3.1e-6), number(None)
        ('1234', '0.988', '3e-06', '')
    """
    if x is None:
        return ""
    return f"{x:.0e}" if abs(x) < 1e-3 and x else f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def newest(pattern: str, device: str = "cpu") -> tuple[Path, Row]:
    """The newest kept results of a script on a kind of device; files are named by date."""
    for path in sorted(RESULTS.glob(pattern), reverse=True):
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content["machine"]["device"] == "cpu") == (device == "cpu"):
            return path, content
    raise FileNotFoundError(f"{pattern}: no kept results of a {device} in {RESULTS}")


def machine(path: Path, content: Row) -> str:
    """Where and when numbers were measured, and the file that has them."""
    what = content["machine"]
    processor = f"one thread of an {what['cpu']}" if what["device"] == "cpu" else f"one {what['device']}"
    return f"{processor}, PyTorch {what['torch'].split('+')[0]}, {what['date']} (`benchmarks/results/{path.name}`)"


def gradients() -> str:
    """What the gradient modes cost, on a CPU and a GPU."""
    parts = []
    for device, batch in (("cpu", 128), ("cuda", 1024)):
        path, content = newest("*-solver-cost.json", device)
        size = {"dim": 64, "num_flows": 3, "batch": batch, "threads": 1}
        rows = [
            [
                f"{row['method']}, `{row['gradient']}`",
                str(row["steps"]),
                number(1e3 * row["forward"]["median"]),
                number(1e3 * row["training"]["median"]),
                number(row["held_bytes"] / 1e6),
                number(row["gradient_error"]),
            ]
            for method in ("euler", "rk4", "dopri5")
            for row in content["rows"]
            if row["method"] == method and all(row[key] == value for key, value in size.items())
        ]
        head = ["", "steps", "solve, ms", "with gradient, ms", "memory held, MB", "gradient error"]
        parts.append(f"D = 64, K = 3, batch {batch}, t = 0 .. 8; {machine(path, content)}:\n\n{table(head, rows)}")
    return "\n\n".join(parts) + "\n\nThe gradient error is relative to the continuous problem's, at 1e-10 in float64.\n"


def peers() -> str:
    """Other libraries on the same potentials."""
    path, content = newest("*-peers.json")
    parts = []
    for dim in sorted({row["dim"] for row in content["rows"]}, reverse=True):
        rows = [
            [
                f"{row['library']}: {row['method']}",
                number(1e3 * row["forward"]["median"]),
                number(1e3 * row["training"]["median"]),
                number(row["faster_training"]),
                number(row["error"]),
            ]
            for row in content["rows"]
            if row["dim"] == dim
        ]
        head = ["", "solve, ms", "with gradient, ms", "× faster", "error"]
        about = f"D = {dim}, K = 3, batch 128, tolerance 1e-5 or eight steps of rk4"
        parts.append(f"{about}; {machine(path, content)}:\n\n{table(head, rows)}")
    return "\n\n".join(parts) + "\n"


def iterations() -> str:
    """Where a training iteration spends its time."""
    path, content = newest("*-training.json")
    names = list(content["rows"][0]["parts"])
    rows = [
        [
            f"{row['preset']}, {row['scheme']}",
            *(number(1e3 * row["parts"].get(name, 0.0)) for name in names),
            number(1e3 * row["whole"]["median"]),
        ]
        for row in content["rows"]
    ]
    return f"Milliseconds an iteration; {machine(path, content)}:\n\n{table(['', *names, 'all'], rows)}\n"


def paper() -> str:
    """The paper's settings beside simpler ones, in a reduced run."""
    path, content = newest("*-paper-tables.json")
    names = {name: name for name in ("scaling", "rotation", "hue", "mean")}
    names |= {"reconstruction_l1": "reconstruction L1"}
    rows = [
        [f"{row['method']}, seed {row['seed']}", *(number(row["numbers"].get(name)) for name in names)]
        for row in content["rows"]
    ]
    said = f"{content['dataset']}, {content['steps']} steps each, a reduced run; {machine(path, content)}"
    return f"{said}:\n\n{table(['', *names.values()], rows)}\n"


def tests() -> str:
    """The files of tests: what each is about, how many functions it has, how many of them are slow."""
    rows = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        found = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        slow = sum("slow" in ast.unparse(mark) for test in found for mark in test.decorator_list)
        about = (ast.get_docstring(module) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
        rows.append([f"`{path.name}`<br>{about}", str(len(found)), str(slow or "")])
    return table(["file", "tests", "slow"], rows) + "\n"


def faults() -> str:
    """The small faults of which some test must notice each."""
    parts = []
    for path in sorted((ROOT / "tests").glob("faults_*.toml")):
        text = path.read_text(encoding="utf-8")
        told = [f"- {fault['what']}" for fault in tomllib.loads(text)["fault"]]
        about = text.split("\n")[0].removeprefix("# Faults of ").rstrip(".")
        parts.append(f"<details><summary>{len(told)} of {about}</summary>\n\n" + "\n".join(told) + "\n\n</details>\n")
    return "\n".join(parts)


MAKERS: dict[str, Callable[[], str]] = {
    maker.__name__: maker for maker in (gradients, peers, iterations, paper, tests, faults)
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, make in MAKERS.items():
        (FOLDER / f"{name}.md").write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
