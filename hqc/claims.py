"""Claims: one command at a time writes a path, and what a killed one left beside it is cleared away by the next.

    .NAME.hqc-lock           locked while a command that writes NAME runs; the lock ends with its process
    .NAME.hqc-1f2e3d4c       what is being written (see `hqc.atomic`), or was when its process was killed
    .NAME.hqc-1f2e3d4c.old   what was to be replaced, where the system cannot exchange two folders at once

In a folder that is written into and never replaced, a work folder for one, the lock is `.hqc-lock` inside it.

Where the file system or the system has no locks nothing is refused and nothing cleared away; what appears at NAME
meanwhile is safe all the same.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from hqc.errors import ArtefactError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "Claim",
    "claim_of",
    "claimed",
    "clear_away",
    "hold",
    "leftovers",
    "mark",
    "remove_tree",
    "restore_interrupted",
]

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_LEFTOVER = re.compile(r"[0-9a-f]{8}(\.old)?")
OLD = ".old"


@dataclass(frozen=True)
class Claim:
    """A path that this command writes. force: what is there may be replaced."""

    target: Path
    force: bool


_CLAIMS: ContextVar[tuple[Claim, ...]] = ContextVar("claims", default=())


def claim_of(target: Path) -> Claim | None:
    """The claim that this thread has on a path."""
    wanted = _absolute(target)
    return next((claim for claim in _CLAIMS.get() if claim.target == wanted), None)


@contextmanager
def claimed(target: Path, *, force: bool = False, wait: bool = False, stays: bool = False) -> Iterator[None]:
    """Keeps other processes and threads from writing `target` while the block runs; a claim in a claim is the same.

    Missing parent folders are made, and removed again if nothing came into them. force: what is there may be replaced.
    wait: for the other to end. stays: it is a folder that is written into and never replaced; it is made too, and the
    lock lies in it, since it may be all that can be written.

    Raises:
        ArtefactError: if another one writes there, or the folder cannot be written.
    """
    target = _absolute(target)
    if claim_of(target) is not None:
        yield
        return
    if not target.name:
        raise ArtefactError(str(target), "is no place for a file or folder", "Choose another name.")
    lock = target / ".hqc-lock" if stays else target.with_name(mark(target) + "lock")
    made = _make_parents(lock)
    try:
        with _locked(target, lock, wait=wait) as locked:
            if locked:
                clear_away(target)
            token = _CLAIMS.set((*_CLAIMS.get(), Claim(target, force)))
            try:
                yield
            finally:
                _CLAIMS.reset(token)
    finally:
        for folder in made:
            with suppress(OSError):  # what holds something stays
                folder.rmdir()


def mark(target: Path) -> str:
    """How the names of the files that hqc keeps beside a path begin."""
    return f".{target.name}.hqc-"


def _absolute(target: Path) -> Path:
    return Path(os.path.abspath(target))


def _make_parents(lock: Path) -> list[Path]:
    """The folders that were made, the innermost first."""
    missing = [folder for folder in lock.parents if not os.path.lexists(folder)]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(lock.parent, error) from error
    return missing


def unwritable(folder: Path, error: OSError) -> ArtefactError:
    """The refusal of a folder that nothing can be written into."""
    return ArtefactError(str(folder), f"cannot be written ({error.strerror or error})", "Choose a writable folder.")


# ---- locks ---------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(target: Path, path: Path, *, wait: bool) -> Iterator[bool]:
    """Yields whether there is a lock; a file system may have none."""
    try:
        descriptor = _acquire(path, wait=wait)
    except BlockingIOError as error:
        writer = _writer(path)
        raise ArtefactError(
            str(target), f"is being written by another hqc command{writer}", "Wait for it, or choose another name."
        ) from error
    except OSError as error:
        raise unwritable(path.parent, error) from error
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            if _is_file_of(descriptor, path):
                path.unlink()
            os.close(descriptor)


def _acquire(path: Path, *, wait: bool) -> int | None:
    """The locked file's descriptor, None where there are no locks.

    Raises:
        BlockingIOError: if another process has it. OSError: if the file cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            if not hold(descriptor, wait=wait):
                path.unlink(missing_ok=True)
                os.close(descriptor)
                return None
            if _is_file_of(descriptor, path):  # else it was removed between opening and locking
                with suppress(OSError):  # a full disk: the lock holds without its number
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def hold(descriptor: int, *, wait: bool = False) -> bool:
    """Locks an open file or folder until it is closed, or its process ends; False where there are no locks.

    Raises:
        BlockingIOError: if another one holds it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in _NO_LOCKS or error.errno == errno.EBADF:  # NFS locks no folder
            return False
        raise
    return True


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def _writer(path: Path) -> str:
    """Which process, where the lock says so."""
    with suppress(OSError, ValueError):
        return f" (process {int(path.read_bytes()[:20])})"
    return ""


# ---- what killed commands left -------------------------------------------------------------------------------------


def leftovers(target: Path) -> list[Path]:
    """What lies beside a path that a command was writing, or had written."""
    start = mark(target)
    try:
        names = [name for name in os.listdir(target.parent) if name.startswith(start)]
    except OSError:
        return []
    return [target.with_name(name) for name in sorted(names) if _LEFTOVER.fullmatch(name[len(start) :])]


def restore_interrupted(target: Path) -> None:
    """Puts back what a killed command had moved away to replace it, unless another one is at it."""
    target = _absolute(target)
    if not os.path.lexists(target) and any(path.name.endswith(OLD) for path in leftovers(target)):
        with suppress(ArtefactError), claimed(target):
            pass


def clear_away(target: Path) -> None:
    """Puts back what was moved away, then removes what no living process writes. Only for whoever has the lock."""
    for path in leftovers(target):
        if path.name.endswith(OLD) and not os.path.lexists(target):
            with suppress(OSError):
                os.rename(path, target)
    for path in leftovers(target):
        if not _in_use(path):
            remove_tree(path)


def _in_use(path: Path) -> bool:
    """Whether a living process holds it: its lock beside may have been swept away by somebody."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:  # a link, or nothing that may be read
        return False
    try:
        hold(descriptor)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def remove_tree(path: Path) -> None:
    """Removes a file, a link or a folder of any modes, as far as that is possible."""
    with suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        _open_folders(path)
    shutil.rmtree(path, ignore_errors=True)


def _open_folders(path: Path) -> None:
    """Lets the owner write in every folder below: nothing can be removed from one that is read-only."""
    path.chmod(0o700)
    for parent, folders, _ in os.walk(path):
        for name in folders:
            folder = Path(parent, name)
            if not folder.is_symlink():
                with suppress(OSError):
                    folder.chmod(0o700)
