"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..errors import DataError


def write(path: Path, content: bytes) -> None:
    """Put a file in place in one move: whatever happens, the old one or the new one is there, and nothing else.

    Raises:
        DataError: the disk is full or cannot be written to.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a disk that became read-only refuses this too
            partial.unlink()
        if isinstance(error, OSError):
            raise DataError(
                f"{path}: cannot be written ({error.strerror}); what was written before is whole. Mend it, then go "
                "on with --ckpt_path"
            ) from None
        raise
