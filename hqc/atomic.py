"""Writing folders and files whole or not at all, without replacing what appeared at their path meanwhile."""

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hqc.claims import OLD, claim_of, claimed, hold, mark, remove_tree, unwritable
from hqc.errors import ArtefactError
from hqc.renames import exchange, rename_new

try:
    from safetensors import SafetensorError
except ImportError:  # what draws without torch writes images alone

    class SafetensorError(Exception):  # type: ignore[no-redef]
        """There is none to be caught."""


__all__ = [
    "atomic_folder",
    "is_artefact",
    "is_stream",
    "refuse_existing",
    "refuse_existing_file",
    "refuse_nested",
    "staged_folder",
    "sync",
    "write_file",
]

_FILE_MODE, _FOLDER_MODE = 0o644, 0o755


# ---- what may be written where -------------------------------------------------------------------------------------


def is_artefact(folder: Path) -> bool:
    """Whether the folder holds a manifest that hqc wrote."""
    try:
        return _has_manifest(folder)
    except OSError:
        return False


def _has_manifest(folder: Path) -> bool:
    try:
        with (folder / "manifest.json").open("rb") as file:
            return re.search(rb'"format": "hqc-', file.read(200)) is not None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False


def refuse_existing(target: Path, *, force: bool) -> None:
    """The checks of `atomic_folder`, before long work starts.

    Raises:
        ArtefactError: if the target exists and may not be replaced.
    """
    if not os.path.lexists(target):
        return
    try:
        ours = _has_manifest(target)
    except OSError as error:
        raise ArtefactError(
            str(target), f"exists and cannot be read ({error.strerror})", "Check its permissions, or the path."
        ) from error
    if not ours:
        raise ArtefactError(str(target), "exists and was not written by hqc", "Choose another name.")
    if not force:
        raise ArtefactError(str(target), "already exists", "Give --force to replace it, or choose another name.")


def refuse_existing_file(target: Path, *, force: bool) -> None:
    """Refuses to overwrite a file without `force`; a device or a pipe is written into, whatever it is.

    Raises:
        ArtefactError: if it exists, or is a folder.
    """
    if target.is_dir():
        raise ArtefactError(str(target), "is a folder; expected a file", "Choose another name.")
    if os.path.lexists(target) and not is_stream(target) and not force:
        raise ArtefactError(str(target), "already exists", "Give --force to replace it, or choose another name.")


def refuse_nested(output: Path, source: Path) -> None:
    """Refuses an output inside the folder that it is made from, or around it: the one would change the other.

    Raises:
        ArtefactError: if it lies there.
    """
    if not source.is_dir():
        return
    inner, outer = output.resolve(), source.resolve()
    if outer in inner.parents:
        raise ArtefactError(str(output), f"lies inside {source}, which it is made from", "Choose a place outside it.")
    if inner in outer.parents and output.is_dir():
        raise ArtefactError(str(output), f"holds {source}, which it is made from", "Choose another name.")


def is_stream(path: Path) -> bool:
    """Whether it is a device, a pipe or a socket: nothing to put a file in the place of."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


# ---- folders -------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that becomes `target` when the block ends well: all of it or nothing.

    The target is claimed meanwhile (see `hqc.claims`); whoever has claimed it before has looked at what is there, and
    what appeared since then counts as what appears meanwhile. Modes are 0644 and 0755 (folders), less the umask.

    Raises:
        ArtefactError: if the target exists and `force` is not set, is not an artefact that hqc wrote, is being written
            by another command, or cannot be written (permissions, a full disk); and if something appeared there
            meanwhile: the result is then kept beside it, under the name that the error says.
    """
    known = claim_of(target) is not None  # then it was free when the work began, and the work is done
    with claimed(target, force=force):
        if not known:
            refuse_existing(target, force=force)
        try:
            with _folder_beside(target) as temporary:
                yield temporary
                _make_last(temporary)
                _put_folder(temporary, target, force=force)
                sync(target.parent)
        except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
            raise ArtefactError(
                str(target), f"could not be written ({error})", "Free some space or choose another folder."
            ) from error


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """The same for an entry of a cache, which is no artefact: it takes the place of whatever is there.

    Raises:
        ArtefactError: if another command writes there. OSError: if it cannot be written.
    """
    with claimed(target, force=True, wait=True), _folder_beside(target) as temporary:
        yield temporary
        _make_last(temporary)
        if not rename_new(temporary, target):
            _take_place(temporary, target)
        sync(target.parent)


@contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    temporary, descriptor = _new_folder(target)
    try:
        yield temporary
    finally:
        if descriptor is not None:
            os.close(descriptor)
        remove_tree(temporary)


def _make_last(folder: Path) -> None:
    """Gives everything in it the usual modes, and waits until it is on the disk."""
    _give_usual_modes(folder)
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _new_folder(target: Path) -> tuple[Path, int | None]:
    """A hidden folder beside the target, and what holds it, so that nobody takes it for one of a killed command."""
    while True:
        temporary = target.with_name(mark(target) + secrets.token_hex(4))
        try:
            temporary.mkdir()
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise unwritable(target.parent, error) from error
    try:
        descriptor = os.open(temporary, os.O_RDONLY)
    except OSError:  # Windows opens no folder
        return temporary, None
    with suppress(OSError):
        hold(descriptor)
    return temporary, descriptor


def _give_usual_modes(folder: Path) -> None:
    """0644 and 0755 less the umask, which the new folder itself shows; a file system may have no modes."""
    mode = folder.stat().st_mode
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            wanted = (mode & 0o7000) | _FOLDER_MODE if path.is_dir() else _FILE_MODE
            with suppress(OSError):
                path.chmod(wanted & (mode | 0o7000))


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk.

    Raises:
        OSError: if they cannot be written there.
    """
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_folder(temporary: Path, target: Path, *, force: bool) -> None:
    """Puts the new folder in the place of the old one, which is then at the temporary's name, or gone.

    Raises:
        ArtefactError: if what is there by now may not be replaced.
    """
    if rename_new(temporary, target):
        return
    try:
        refuse_existing(target, force=force)
    except ArtefactError as error:
        raise _kept(temporary, target) from error
    _take_place(temporary, target)


def _take_place(temporary: Path, target: Path) -> None:
    """Where two folders cannot be exchanged there are two renames; killed in between, the old one is put back by the
    next command on this path."""
    if exchange(temporary, target):
        return
    old = temporary.with_name(temporary.name + OLD)
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(old, target)
        raise
    remove_tree(old)  # of a link only the link is removed, not the folder that it points to


def _kept(temporary: Path, target: Path) -> ArtefactError:
    """Gives a finished result a name beside the one that was taken meanwhile."""
    count = 1
    while not rename_new(temporary, kept := _beside(target, temporary, count)):
        count += 1
    return ArtefactError(
        str(target),
        f"appeared while this command ran and is not replaced; the result is kept as {kept}",
        "Move one of them.",
    )


def _beside(target: Path, result: Path, count: int) -> Path:
    """out.new for a folder, grid.new.png for a file."""
    more = ".new" if count == 1 else f".new{count}"
    if result.is_dir():
        return target.with_name(target.name + more)
    return target.with_name(target.stem + more + target.suffix)


# ---- files ---------------------------------------------------------------------------------------------------------


def write_file(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: a temporary file in the same folder, then a rename.

    Missing parent folders are made. What is there is replaced, unless the path was claimed without `force`. Into a
    device or a pipe the data is written as it is.

    Raises:
        ArtefactError: if it cannot be written; what stood at `path` before is untouched.
    """
    if is_stream(path):
        _write_stream(path, data)
        return
    claim = claim_of(path)
    force = claim is None or claim.force
    with claimed(path, force=force):
        temporary = path.with_name(mark(path) + secrets.token_hex(4))
        try:
            _write_new(temporary, data)
            _put_file(temporary, path, force=force)
            sync(path.parent)
        except OSError as error:
            raise _unwritable_file(path, error) from error
        finally:
            remove_tree(temporary)


def _write_new(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE_MODE), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _put_file(temporary: Path, path: Path, *, force: bool) -> None:
    if rename_new(temporary, path):
        return
    if not force:
        raise _kept(temporary, path)
    os.replace(temporary, path)


def _write_stream(path: Path, data: bytes) -> None:
    try:
        with path.open("wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
    except OSError as error:
        raise _unwritable_file(path, error) from error


def _unwritable_file(path: Path, error: OSError) -> ArtefactError:
    return ArtefactError(
        str(path), f"cannot be written ({error.strerror or error})", "Free some space or choose another place."
    )
