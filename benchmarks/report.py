"""What a benchmark writes: the machine's description, tables, JSON; and the arguments that all scripts take."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchdiffeq

import cflow


def machine(device: torch.device) -> dict[str, str]:
    """What the numbers were measured on."""
    described = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchdiffeq": torchdiffeq.__version__,
        "cflow": cflow.__version__,
    }
    if device.type == "cuda":
        described["cuda"] = str(torch.version.cuda)
    return described


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def one_line(described: Mapping[str, str]) -> str:
    """The machine's description on one line.

    Example:
        >>> one_line({"device": "cpu", "torch": "2.9"})
        'device cpu, torch 2.9'
    """
    return ", ".join(f"{key} {value}" for key, value in described.items())


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as their widest entry, the first one left-aligned.

    Example:
        >>> print_table(["method", "ms"], [["rk4", "1.0"], ["euler", "10.0"]])
        method    ms
        rk4      1.0
        euler   10.0
    """
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def milliseconds(timing: Mapping[str, float]) -> tuple[str, str]:
    """Median and quartiles of what `Timing.document` returned, for a table.

    Example:
        >>> milliseconds({"median": 0.012, "low": 0.0115, "high": 0.0131})
        ('12.00', '11.50 .. 13.10')
    """
    median, low, high = (1e3 * timing[name] for name in ("median", "low", "high"))
    return f"{median:.2f}", f"{low:.2f} .. {high:.2f}"


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Keep a document, numbers that JSON does not know as null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(document), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def _finite(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def command_line(description: str | None, results: str, *, rounds: int | None) -> argparse.ArgumentParser:
    """The arguments that every script takes.

    Arguments:
        description: the script's docstring.
        results: name of the file for the results, without its ending.
        rounds: timed rounds; None leaves them to the script.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_of, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="timed rounds" + (" (default %(default)s)" * (rounds is not None))
    )
    parser.add_argument(
        "--json", type=Path, default=Path(f"{results}.json"), help="file for the results (default %(default)s)"
    )
    return parser


def device_of(name: str) -> torch.device:
    """A device by name, for argparse.

    Raises:
        argparse.ArgumentTypeError: CUDA where there is none.
    """
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("PyTorch finds no CUDA device here; use --device cpu")
    return device


def first_sentence(error: Exception) -> str:
    """Why something is skipped, in one short line."""
    return str(error).split("\n")[0].split("; ")[0]
