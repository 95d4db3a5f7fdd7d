"""Files that are complete or absent, even on a full disk or after a power cut, and messages for failed writes."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 2**20
_FULL, _DENIED = "Free some room there", "Make that folder writable, or choose another one"
ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "Raise the limit for the size of files (ulimit -f)",
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: _DENIED,
    errno.EEXIST: "Move away what is in its place",
    errno.ENOTDIR: "Move away what is in its place",
    errno.EISDIR: "Move away what is in its place",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EIO: "Check that disk",
}


class WriteError(OSError):
    """Something could not be written; the message says what and where, why, how much is free, and what to do."""


@contextmanager
def explain_write_errors(path: Path, what: str, needed: int | None = None) -> Iterator[None]:
    """Raise WriteError, whose message says what to do, for a failed write within this context.

    Args:
        path: the file or folder that is written.
        what: what it is, for the message, such as "the checkpoint".
        needed: its bytes, if they are known.

    Raises:
        WriteError: for a failed write. Other errors pass, also those of connections and of files that are read.
    """
    try:
        yield
    except Exception as raised:
        error: BaseException | None = raised
        while error is not None and not _is_write_error(error, path):
            error = error.__context__  # PyTorch and Matplotlib raise another error after an OSError
        if not isinstance(error, OSError) or isinstance(raised, WriteError):
            raise
        folder = next(place for place in (path, *path.absolute().parents) if os.path.exists(place))
        size = f"it takes {needed / MIB:.1f} MiB, " if needed is not None else ""
        room = f"{size}{shutil.disk_usage(folder).free / MIB:.1f} MiB are free there"
        advice = ADVICE.get(error.errno or 0, "Mend that")
        raise WriteError(
            f"{path}: {what} could not be written: {error} ({room}). {advice}, then do the same again: "
            "what was written before is as it was"
        ) from raised


def _is_write_error(error: BaseException, path: Path) -> bool:
    """Whether an error comes from writing `path`, and not from a connection or from reading a file elsewhere."""
    if isinstance(error, shutil.Error):  # from copying a folder
        return True
    if not isinstance(error, OSError):
        return False
    if not isinstance(error.filename, str | os.PathLike):
        return error.errno in ADVICE
    target, culprit = path.absolute(), Path(error.filename).absolute()
    is_near = culprit in target.parents or target.parent in culprit.parents
    return is_near or (error.errno in ADVICE and not culprit.is_file())


@contextmanager
def atomic_write(path: Path, what: str, needed: int | None = None) -> Iterator[Path]:
    """Give a temporary path for a file's content, and rename it to `path` at the end of the context.

    Until then, and if the context ends with an error, `path` is as it was. Any number of processes can do so at once.
    The arguments are those of `explain_write_errors`, and so is the error.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "note.txt")
    ...     with atomic_write(path, "the note") as temporary:
    ...         _ = temporary.write_text("done")
    ...     path.read_text()
    'done'
    """
    with explain_write_errors(path, what, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            temporary = Path(folder, path.name)
            yield temporary
            fsync_path(temporary)  # after a power cut a rename may be there without the content
            os.replace(temporary, path)
            fsync_path(path.parent)


def remove_leftovers(path: Path) -> None:
    """Delete what killed processes have left of `atomic_write`; only the one process that writes `path` may do so."""
    for leftover in path.parent.glob(f".{path.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Windows does not sync folders."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
