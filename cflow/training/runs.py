"""Where runs lie: ``runs/<name>/version_<n>/checkpoints/{best,last}.ckpt``, and what their checkpoints hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..checkpoint import Kind, find_checkpoint, read_checkpoint
from ..errors import ArgumentError, DataError

CONFIG_KEY = "cflow_config"
DEFAULT_ROOT = "runs"


def versions(root: Path, name: str | None) -> list[Path]:
    """Return the runs under root (of one name, or of all), oldest first."""
    folders = [p for p in root.glob(f"{name or '*'}/version_*") if re.fullmatch(r"version_\d+", p.name)]
    by_number = sorted(folders, key=lambda p: int(p.name.removeprefix("version_")))
    # Numbers say which run of one name is newest; between names only the clock can.
    return by_number if name else sorted(by_number, key=lambda p: p.stat().st_mtime)


def claim_run(root: Path, name: str) -> Path:
    """Make and return the folder of a new run, also when another process starts one at the same moment.

    Raises:
        ArgumentError: the folder cannot be made.
    """
    number = max((int(p.name.removeprefix("version_")) for p in versions(root, name)), default=-1)
    while True:
        number += 1
        folder = root / name / f"version_{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise ArgumentError(f"--trainer.default_root_dir={str(root)!r}: {folder} is in the way.") from None
        except OSError as error:
            raise ArgumentError(
                f"--trainer.default_root_dir={str(root)!r}: cannot make {folder} ({error.strerror}); "
                "choose a folder you can write to."
            ) from None
        else:
            return folder


def named_checkpoint(path: str, root: Path, name: str | None, prefer: Kind) -> Path:
    """Return the checkpoint file that a user's ``--ckpt_path`` means.

    Arguments:
        path: a checkpoint, the folder of a run, or ``last`` / ``best`` for that file of the newest run
            (``last`` asks for the newest *run*: which of its files is taken follows `prefer`).
        root: the folder of all runs.
        name: runs of this name only, or None for all.
        prefer: the file of a run to take, ``"best"`` or ``"last"``; the other one where it is missing.

    Raises:
        DataError: there is no such file, or no run yet.
    """
    if path in ("last", "best") and not Path(path).exists():
        for run in reversed(versions(root, name)):
            if found := find_checkpoint(run, "best" if path == "best" else prefer):
                return found
        where = root / name if name else root
        raise DataError(f"--ckpt_path {path}: no run with a checkpoint under {where}; train one with `cflow fit`.")
    if (file := Path(path)).is_dir():
        if found := find_checkpoint(file, prefer):
            return found
        raise DataError(f"--ckpt_path {path}: no checkpoints/best.ckpt or last.ckpt in this folder.")
    if not file.is_file():
        raise DataError(f"--ckpt_path {path}: there is no such file; give a checkpoint, a run's folder, or `last`.")
    return file


def run_folder(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to, or the checkpoint's own folder."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" else folder


def read_fit(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint of ``cflow fit``, after verifying the file's checksums.

    Raises:
        DataError: the file is damaged, or not a checkpoint of ``cflow fit``.
    """
    content = read_checkpoint(path, "--ckpt_path")
    if not isinstance(content.get(CONFIG_KEY), dict):
        raise DataError(f"--ckpt_path {path}: not a checkpoint written by `cflow fit` (it holds no configuration).")
    return content
