"""Folders and files are written whole or not at all, and never in the place of what appeared meanwhile."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import hqc.atomic
import hqc.claims
import hqc.renames
from hqc.atomic import atomic_folder, refuse_existing, refuse_existing_file, refuse_nested, staged_folder, write_file
from hqc.claims import claimed, restore_interrupted
from hqc.errors import ArtefactError
from hqc.storage import check_manifest, write_manifest

ROOT = Path(hqc.atomic.__file__).parents[1]


def save(target: Path, text: str, *, force: bool = False) -> None:
    """An artefact with one file in it and one in a folder."""
    with atomic_folder(target, force=force) as folder:
        (folder / "text").write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "more").write_text(text)
        write_manifest(folder, "hqc-test", {})


def text_of(target: Path) -> str:
    check_manifest(target, "hqc-test")
    return (target / "text").read_text()


@contextmanager
def meanwhile(target: Path, act: Callable[[], object], *, force: bool = False) -> Iterator[None]:
    """Something happens to the target while an artefact is written."""
    with atomic_folder(target, force=force) as folder:
        (folder / "text").write_text("new")
        write_manifest(folder, "hqc-test", {})
        act()
    yield


@pytest.fixture(params=["renameat2", "two renames"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the system's exchange of two folders, and without."""
    if request.param == "two renames":
        monkeypatch.setattr(hqc.renames, "_system_call", lambda: None)
    elif hqc.renames._system_call() is None:
        pytest.skip("this system has no renameat2")
    return str(request.param)


# ---- what appears meanwhile ----------------------------------------------------------------------------------------


def mine(target: Path) -> None:
    target.mkdir()
    (target / "notes.txt").write_text("precious")


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_appears_meanwhile_is_kept_and_so_is_the_result(force: bool, tmp_path: Path) -> None:
    target = tmp_path / "out.hqc"
    with pytest.raises(ArtefactError) as caught, meanwhile(target, lambda: mine(target), force=force):
        pass
    assert str(caught.value) == (
        f"{target}: appeared while this command ran and is not replaced; the result is kept as "
        f"{tmp_path / 'out.hqc.new'}. Move one of them."
    )
    assert (target / "notes.txt").read_text() == "precious"
    assert text_of(tmp_path / "out.hqc.new") == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.hqc", "out.hqc.new"]


@pytest.mark.usefixtures("system")
def test_an_empty_folder_a_file_and_a_link_are_kept_too(tmp_path: Path) -> None:
    acts: dict[str, Callable[[Path], object]] = {
        "empty": lambda path: path.mkdir(),
        "file": lambda path: path.write_text("precious"),
        "link": lambda path: path.symlink_to(tmp_path / "nowhere"),
    }
    for name, act in acts.items():
        target = tmp_path / name
        with pytest.raises(ArtefactError, match="appeared"), meanwhile(target, lambda act=act, t=target: act(t)):
            pass
        assert text_of(tmp_path / f"{name}.new") == "new"
    assert list((tmp_path / "empty").iterdir()) == []
    assert (tmp_path / "file").read_text() == "precious"
    assert (tmp_path / "link").is_symlink()


@pytest.mark.usefixtures("system")
def test_names_of_kept_results_are_not_taken_twice(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (tmp_path / "out.new").write_text("mine")
    with pytest.raises(ArtefactError, match=r"kept as .*/out\.new2\."), meanwhile(target, lambda: mine(target)):
        pass
    assert text_of(tmp_path / "out.new2") == "new"
    assert (tmp_path / "out.new").read_text() == "mine"


@pytest.mark.usefixtures("system")
def test_an_artefact_that_appears_meanwhile_is_replaced_with_force_alone(tmp_path: Path) -> None:
    def other() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "text").write_text("other")
        write_manifest(tmp_path / "out", "hqc-test", {})

    with pytest.raises(ArtefactError, match="appeared"), meanwhile(tmp_path / "out", other):
        pass
    assert text_of(tmp_path / "out") == "other"
    with meanwhile(tmp_path / "forced", lambda: os.rename(tmp_path / "out", tmp_path / "forced"), force=True):
        pass
    assert text_of(tmp_path / "forced") == "new"


@pytest.mark.usefixtures("system")
def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "grid.png"
    with claimed(target):
        target.write_bytes(b"mine")
        with pytest.raises(ArtefactError, match=r"the result is kept as .*grid\.new\.png\. Move one of them\."):
            write_file(target, b"new")
    assert target.read_bytes() == b"mine"
    assert (tmp_path / "grid.new.png").read_bytes() == b"new"
    with claimed(target, force=True):
        write_file(target, b"forced")
    write_file(target, b"unclaimed")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.new.png", "grid.png"]


# ---- what is there already -----------------------------------------------------------------------------------------


def test_an_artefact_that_cannot_be_read_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "out", "old")

    def denied(folder: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(hqc.atomic, "_has_manifest", denied)
    for force in (False, True):
        with pytest.raises(ArtefactError) as caught:
            refuse_existing(tmp_path / "out", force=force)
        assert "exists and cannot be read (Permission denied)" in str(caught.value)
        assert "not written by hqc" not in str(caught.value)


def test_outputs_inside_and_around_their_source_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "sd"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    for inside in (source / "x.hqc", source / "a" / "b", tmp_path / "link" / "x"):
        with pytest.raises(ArtefactError, match=r"lies inside .*, which it is made from"):
            refuse_nested(inside, source)
    with pytest.raises(ArtefactError, match=r"holds .*, which it is made from"):
        refuse_nested(tmp_path, source)
    refuse_nested(tmp_path / "x.hqc", source)
    refuse_nested(source, source)  # in the place of itself: another check's affair
    refuse_nested(tmp_path / "file" / "x", tmp_path / "file")  # no folder


def test_files_are_not_written_over_and_folders_never(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"already exists\. Give --force"):
        refuse_existing_file(tmp_path / "x.png", force=False)
    refuse_existing_file(tmp_path / "x.png", force=True)
    with pytest.raises(ArtefactError, match="is a folder; expected a file"):
        refuse_existing_file(tmp_path, force=True)


# ---- modes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o027])
def test_files_are_0644_and_folders_0755_less_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "inner").mkdir(mode=0o700)
            for path, mode in ((folder / "secret", 0o600), (folder / "inner" / "open", 0o777)):
                path.write_text("")
                path.chmod(mode)
            write_manifest(folder, "hqc-test", {})
        write_file(tmp_path / "grid.png", b"x")
    finally:
        os.umask(before)
    found = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    files, folders = 0o644 & ~umask, 0o755 & ~umask
    assert found == {
        "out": folders,
        "inner": folders,
        **dict.fromkeys(("secret", "open", "manifest.json", "grid.png"), files),
    }


@pytest.mark.usefixtures("system")
def test_an_artefact_with_folders_that_are_read_only_can_be_replaced(tmp_path: Path) -> None:
    """As an earlier version left them, that copied the modes of a read-only source."""
    save(tmp_path / "out", "old")
    for path in (tmp_path / "out" / "inner", tmp_path / "out"):
        path.chmod(0o555)
    without_rights(tmp_path / "out")
    assert (tmp_path / "out" / "inner" / "more").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def without_rights(target: Path) -> None:
    """Replaces it as somebody who has no rights over everything: root may write what is read-only."""
    drop = [] if os.geteuid() else ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"]
    script = SAVE.format(root=str(ROOT)) + 'save(Path(sys.argv[1]), "new")'
    done = subprocess.run([*drop, sys.executable, "-c", script, target], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- errors and crashes --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("old", [False, True])
def test_a_rename_that_fails_leaves_the_old_and_nothing_else(
    old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*paths: object) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    if old:
        save(tmp_path / "out", "old")
    monkeypatch.setattr(hqc.atomic, "rename_new", broken)
    with pytest.raises(ArtefactError, match=r"could not be written \(.*Input/output error"):
        save(tmp_path / "out", "new", force=True)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if old else [])
    assert not old or text_of(tmp_path / "out") == "old"


def test_a_second_rename_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hqc.renames, "_system_call", lambda: None)
    save(tmp_path / "out", "old")
    real, count = os.rename, [0]

    def second_fails(source: Path, target: Path) -> None:
        count[0] += 1
        if count[0] == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(ArtefactError, match="Input/output error"):
        save(tmp_path / "out", "new", force=True)
    assert count[0] == 3
    assert text_of(tmp_path / "out") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


SAVE = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import hqc.renames
from hqc.atomic import atomic_folder
def save(target, text):
    with atomic_folder(target, force=True) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "more").write_text(text)
        (folder / "manifest.json").write_text('{{"format": "hqc-' + text + '"}}')
"""
"""Without torch, so that a process starts quickly."""

CRASH = (
    SAVE
    + """
if {plain}:
    hqc.renames._system_call = lambda: None
calls = [0]
def dying(function, at):
    def count():
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
    def call(*args, **kwargs):
        count()
        result = function(*args, **kwargs)
        count()
        return result
    return call
places = [(os, name) for name in "rename link mkdir fsync unlink rmdir open close".split()]
places.append((hqc.renames, "_renameat2"))
for at in range(1, 1000):
    child = os.fork()
    if child == 0:
        for module, name in places:
            setattr(module, name, dying(getattr(module, name), at))
        save(Path(sys.argv[1], str(at), "out"), "new")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        print(at)
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
"""
)
"""Replaces artefacts in processes of which the n-th is killed before or after its n-th operation on files."""


@pytest.mark.parametrize("plain", [False, True], ids=["renameat2", "two renames"])
def test_killed_at_any_operation_there_is_the_old_or_the_new(plain: bool, tmp_path: Path) -> None:
    """After every crash the artefact is whole, at once or (two renames) for whoever reads it next; then all is tidy."""
    if not plain and hqc.renames._system_call() is None:
        pytest.skip("this system has no renameat2")
    save(tmp_path / "old", "old")
    for at in range(1, 300):
        shutil.copytree(tmp_path / "old", tmp_path / str(at) / "out")
    script = CRASH.format(root=str(ROOT), plain=plain)
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    points, seen = int(done.stdout), set()
    assert 20 < points < 300
    for at in range(1, points):
        target = tmp_path / str(at) / "out"
        if not plain:
            assert target.is_dir()  # never in a hidden folder alone
        restore_interrupted(target)  # as whoever reads it does
        found = json.loads((target / "manifest.json").read_text())["format"]
        assert (target / "inner" / "more").read_text() == {"hqc-new": "new", "hqc-test": "old"}[found]
        seen.add(found)
        save(target, "third", force=True)
        assert text_of(target) == "third"
        assert [p.name for p in target.parent.iterdir()] == ["out"]
    assert seen == {"hqc-test", "hqc-new"}


def test_an_entry_of_a_cache_takes_the_place_of_anything(system: str, tmp_path: Path) -> None:
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry" / "old").write_text("")
    with staged_folder(tmp_path / "entry") as folder:
        (folder / "new").write_text("")
    assert [p.name for p in (tmp_path / "entry").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["entry"]


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_full_device_is_said_and_stays_a_device() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    before = full.stat()
    with pytest.raises(ArtefactError, match=r"/dev/full: cannot be written \(No space left on device\)\."):
        write_file(full, b"x")
    assert stat.S_ISCHR(full.stat().st_mode)
    assert full.stat().st_ino == before.st_ino


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_file(tmp_path / "pipe", b"picture")
        assert os.read(reader, 100) == b"picture"
    finally:
        os.close(reader)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "grid.png").write_bytes(b"old")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ArtefactError, match=r"cannot be written \(No space left on device\)\. Free some space"):
        write_file(tmp_path / "grid.png", b"new")
    assert (tmp_path / "grid.png").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_a_file_in_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtefactError, match="cannot be written"):
        write_file(tmp_path / "file" / "grid.png", b"x")
