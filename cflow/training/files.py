"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from ..errors import DataError

ANONYMOUS = getattr(os, "O_TMPFILE", None)  # Linux: a file without a name, which is gone with the process that made it


def write(path: Path, content: bytes) -> None:
    """Put a file in place in one move: whatever happens, the old one or the new one is there, whole.

    A process that is killed leaves nothing half written where the file system knows files without a name; elsewhere
    perhaps a ``.partial`` file, which nothing reads.

    Raises:
        DataError: the disk is full or cannot be written to.
    """
    # a name of its own: another process may be writing the same file
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(_opened(partial), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if not partial.exists():
                # given some descriptor of a folder, Python follows the link to the file, as it is documented to do
                os.link(f"/proc/self/fd/{file.fileno()}", partial, src_dir_fd=file.fileno(), follow_symlinks=True)
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


def drawn(path: Path, draw: Callable[[Path], object]) -> Path:
    """Have a file drawn under another name, and put it in place in one move; a link there is replaced, not followed.

    Raises:
        DataError: it cannot be written.
    """
    partial = path.with_name(f".{secrets.token_hex(4)}.{path.name}")  # what draws looks at the ending
    try:
        draw(partial)
        return partial.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _opened(partial: Path) -> int:
    """A new file to write to: without a name, or this one where there is no such thing."""
    if ANONYMOUS is not None and Path("/proc/self/fd").is_dir():
        with contextlib.suppress(OSError):  # not every file system has it; a real problem comes again below
            return os.open(partial.parent, ANONYMOUS | os.O_WRONLY, 0o666)
    return os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
