"""Files that are whole or absent, on a full disk and after a power cut too, and words for what could not be written."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 2**20
FULL, DENIED = "Free some room there", "Make that folder writable, or choose another one"
ADVICE = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: "Raise the limit for the size of files (ulimit -f)",
    errno.EACCES: DENIED,
    errno.EPERM: DENIED,
    errno.EROFS: DENIED,
    errno.EEXIST: "Move away what is in its place",
    errno.ENOTDIR: "Move away what is in its place",
    errno.EISDIR: "Move away what is in its place",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EIO: "Look after that disk",
}


class WriteError(OSError):
    """Something could not be written; the message says what and where, why, how much is free, and what to do."""


@contextmanager
def writing(path: Path, what: str, needed: int | None = None) -> Iterator[None]:
    """Raises WriteError for a failed write in here, where `what`, of `needed` bytes if that is known, goes to `path`.

    Other errors stay what they are, also those of connections and of files that are read.
    """
    try:
        yield
    except Exception as raised:
        error: BaseException | None = raised
        while error is not None and not is_of_writing(error, path):
            error = error.__context__  # PyTorch and Matplotlib stumble over an OSError and raise another error
        if not isinstance(error, OSError) or isinstance(raised, WriteError):
            raise
        place = next(place for place in (path, *path.absolute().parents) if os.path.exists(place))
        takes = f"it takes {needed / MIB:.1f} MiB, " if needed is not None else ""
        room = f"{takes}{shutil.disk_usage(place).free / MIB:.1f} MiB are free there"
        advice = ADVICE.get(error.errno or 0, "See to it")
        raise WriteError(
            f"{path}: {what} could not be written: {error} ({room}). {advice}, then do the same again: "
            "what was written before is as it was"
        ) from raised


def is_of_writing(error: BaseException, path: Path) -> bool:
    """Whether an error comes from writing `path`, and not from a connection or from reading a file elsewhere."""
    if isinstance(error, shutil.Error):  # of a folder that was copied
        return True
    if not isinstance(error, OSError):
        return False
    if not isinstance(error.filename, str | os.PathLike):
        return error.errno in ADVICE
    own, named = path.absolute(), Path(error.filename).absolute()
    is_near = named in own.parents or own.parent in named.parents
    return is_near or (error.errno in ADVICE and not named.is_file())


@contextmanager
def whole(path: Path, what: str, needed: int | None = None) -> Iterator[Path]:
    """A place for the file's content, renamed to `path` in the end: what was there is there until then.

    Any number of processes can do so at once. Raises WriteError, as `writing` does.
    """
    with writing(path, what, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            part = Path(folder, path.name)
            yield part
            sync(part)  # a rename can outlive, in a power cut, what it has named
            os.replace(part, path)
            sync(path.parent)


def sweep(path: Path) -> None:
    """Delete what processes have left that were killed in `whole`; for the only one that writes `path`."""
    for left in path.parent.glob(f".{path.name}-*"):
        shutil.rmtree(left, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows does not sync folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
