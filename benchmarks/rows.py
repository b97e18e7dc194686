"""Tables that go on: every number is a row under a key of its own, kept as soon as it is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import machine, write_json

SCHEMA = 1
Numbers = dict[str, float]


@dataclass(frozen=True)
class Row:
    """One line of numbers of a table, and how to get them."""

    table: str
    method: str
    case: str
    seed: int
    run: Callable[[], Numbers]

    @property
    def key(self) -> str:
        """What it is kept under."""
        return f"{self.table}/{self.method}/{self.case}/{self.seed}"


def completed(rows: Iterable[Row], path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a file with these rows in it; those that it lacks are computed, and each kept at once.

    Arguments:
        rows: what is asked for, looked at once the file is known to fit; others that the file has stay there.
        path: the JSON file; it need not exist.
        settings: what the numbers depend on beside their keys.

    Raises:
        SystemExit: the file was made with other settings.
    """
    document: dict[str, Any] = {"schema": SCHEMA, **settings, "rows": {}}
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if any(kept.get(name) != document[name] for name in ("schema", *settings)):
            raise SystemExit(f"{path} was made with other settings; move it away or name another --json")
        document["rows"] = kept["rows"]
    document["machine"] = machine(torch.device("cpu"))
    for row in rows:
        if row.key not in document["rows"]:
            found = row.run()
            names = {name: getattr(row, name) for name in ("table", "method", "case", "seed")}
            document["rows"][row.key] = names | found
            print(row.key, " ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
            write_json(path, document)
    return document
