"""The marks of two checkouts, measured in turn on one machine: is this version slower than that one anywhere?

    python benchmarks/compare_versions.py ../cflow-before                # this checkout against that one
    python benchmarks/compare_versions.py ../cflow-before --quick        # D=64, K=3 alone

Both run these very scripts, each with its own cflow, as processes one after the other: A B A B …. A mark is the median
over the rounds. "Slower" is how much worse the first checkout's mark is, in per cent; below nothing, it is better.
"Time" is the first one's own time over the second one's: a divergence over its velocity looks worse where only the
velocity has become faster. Differences of relative rounding are shown and not judged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from report import print_table, write_json

SCHEMA = 1
HERE = Path(__file__).resolve().parent
HEADER = ("mark", "size", "this", "other", "slower by %", "", "time")
Values = dict[tuple[str, str], list[tuple[float, float | None]]]  # (mark, size) → value and seconds, round by round


def measure(checkout: Path, words: Sequence[str]) -> list[dict[str, Any]]:
    """The marks of one checkout, in a process of its own.

    Raises:
        RuntimeError: the process fails, or imports another cflow.
    """
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    where = "import cflow, pathlib; print(pathlib.Path(cflow.__file__).resolve().parent.parent)"
    found = _run([sys.executable, "-P", "-c", where], environment).strip()
    if Path(found) != checkout.resolve():
        raise RuntimeError(f"{checkout}: cflow is imported from {found}; is that a checkout?")
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "marks.json")
        _run([sys.executable, str(HERE / "solver_cost.py"), "--marks", "--json", str(results), *words], environment)
        return list(json.loads(results.read_text(encoding="utf-8"))["marks"])


def _run(command: Sequence[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
    return done.stdout


def collect(rounds: Iterable[list[dict[str, Any]]]) -> Values:
    """Values and seconds by mark and size."""
    values: Values = {}
    for marks in rounds:
        for mark in marks:
            values.setdefault((mark["name"], mark["size"]), []).append((mark["value"], mark["seconds"]))
    return values


def compare(this: Values, other: Values, tolerance: float) -> list[dict[str, Any]]:
    """One row for each mark that both have.

    Arguments:
        this, other: values and seconds by mark and size.
        tolerance: per cent that are still called the same.
    """
    rows = []
    for name, size in (key for key in this if key in other):
        (a, seconds), (b, others) = (_medians(values[name, size]) for values in (this, other))
        worse = 100 * ((b / a if "faster" in name else a / b) - 1)
        judged = not name.startswith("gradient")
        verdict = "SLOWER" if judged and worse > tolerance else "faster" if judged and worse < -tolerance else ""
        row = {"name": name, "size": size, "this": a, "other": b, "ratio": a / b, "slower_percent": worse}
        row |= {"time_ratio": seconds / others if seconds and others else None, "verdict": verdict}
        rows.append(row | {"rounds_this": this[name, size], "rounds_other": other[name, size]})
    return rows


def _medians(rounds: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    seconds = [s for _, s in rounds if s is not None]
    return statistics.median(value for value, _ in rounds), statistics.median(seconds) if seconds else None


def show(rows: Iterable[dict[str, Any]]) -> None:
    """Print the table."""
    cells = [
        (
            *(r["name"], r["size"], f"{r['this']:.3g}", f"{r['other']:.3g}", f"{r['slower_percent']:+.1f}"),
            *(r["verdict"], "" if r["time_ratio"] is None else f"{r['time_ratio']:.2f} ×"),
        )
        for r in rows
    ]
    print_table(HEADER, cells)


def main(words: Sequence[str] | None = None) -> None:
    """Measure both in turn, print, keep; exit status 1 where a mark is worse by more than the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("--this", type=Path, default=HERE.parent, help="the checkout in question (default: this one)")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each (default %(default)s)")
    parser.add_argument(
        "--tolerance", type=float, default=5.0, help="per cent that count as equal (default %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="D=64, K=3 alone")
    parser.add_argument(
        "--budget", type=float, default=5.0, help="seconds of timing a size and process (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, default=Path("compare_versions.json"), help="file for the results")
    args = parser.parse_args(words)
    more = ["--budget", str(args.budget), *["--quick"] * args.quick]
    both: list[tuple[Path, list[list[dict[str, Any]]]]] = [(args.this, []), (args.other, [])]
    for done, (checkout, found) in itertools.product(range(args.rounds), both):
        print(f"round {done + 1} of {args.rounds}: {checkout}", flush=True)
        found.append(measure(checkout, more))
    this, other = (collect(found) for _, found in both)
    rows = compare(this, other, args.tolerance)
    show(rows)
    write_json(args.json, {"benchmark": "compare_versions", "schema": SCHEMA, "rows": rows})
    sys.exit(any(row["verdict"] == "SLOWER" for row in rows))


if __name__ == "__main__":
    main()
