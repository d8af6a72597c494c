"""One command at a time writes a path; what a killed one left is cleared away, what a living one writes is not."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import hqc.claims
from hqc.atomic import atomic_folder
from hqc.claims import claimed, leftovers, remove_tree, restore_interrupted
from hqc.errors import ArtefactError
from hqc.storage import write_manifest

fcntl = pytest.importorskip("fcntl")
ROOT = Path(hqc.claims.__file__).parents[1]

HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from hqc.atomic import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "text").write_text("theirs")
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Another process that is writing tmp_path/out."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(root=str(ROOT)), tmp_path / "out"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_the_second_process_is_refused_and_changes_nothing(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    for path in (tmp_path / "out", tmp_path / "x" / ".." / "out"):
        with pytest.raises(ArtefactError) as caught, claimed(path):
            pass
        assert str(caught.value) == (
            f"{tmp_path / 'out'}: is being written by another hqc command (process {holder.pid}). "
            "Wait for it, or choose another name."
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    holder.communicate("go on\n", timeout=60)
    assert (tmp_path / "out" / "text").read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_lock_ends_with_its_process_and_what_it_left_goes(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    left = leftovers(tmp_path / "out")
    assert [p.is_dir() for p in left] == [True]
    (tmp_path / ".out.hqc-notes").write_text("mine")
    (tmp_path / ".other.hqc-1234abcd").mkdir()
    with claimed(tmp_path / "out"):
        assert leftovers(tmp_path / "out") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.hqc-1234abcd", ".out.hqc-notes"]


def test_what_a_living_process_writes_stays_though_its_lock_was_swept(
    holder: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    (tmp_path / ".out.hqc-lock").unlink()
    with claimed(tmp_path / "out"):
        assert len(leftovers(tmp_path / "out")) == 1
    holder.communicate("go on\n", timeout=60)
    assert (tmp_path / "out" / "text").read_text() == "theirs"


def test_waiting_for_the_other(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    said = threading.Timer(0.3, lambda: holder.communicate("go on\n", timeout=60))
    said.start()
    with claimed(tmp_path / "out", wait=True):
        assert (tmp_path / "out" / "text").read_text() == "theirs"
    said.join()


def test_two_threads(tmp_path: Path) -> None:
    found: list[str] = []

    def second() -> None:
        try:
            with claimed(tmp_path / "out"):
                found.append("claimed")
        except ArtefactError as error:
            found.append(error.found)

    with claimed(tmp_path / "out"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert found == [f"is being written by another hqc command (process {os.getpid()})"]


def test_a_claim_within_a_claim_is_the_same(tmp_path: Path) -> None:
    with claimed(tmp_path / "out"), claimed(tmp_path / "other"):
        with claimed(tmp_path / "x" / ".." / "out"):
            pass
        assert sorted(p.name for p in tmp_path.iterdir()) == [".other.hqc-lock", ".out.hqc-lock"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_stays_is_locked_inside(tmp_path: Path) -> None:
    """It may be all that can be written, a mounted one for example."""
    with claimed(tmp_path / "work", stays=True):
        assert [p.name for p in tmp_path.iterdir()] == ["work"]
        assert [p.name for p in (tmp_path / "work").iterdir()] == [".hqc-lock"]
        (tmp_path / "work" / "log").write_text("")
    assert [p.name for p in tmp_path.rglob("*")] == ["work", "log"]
    with claimed(tmp_path / "other", stays=True):
        pass
    assert not (tmp_path / "other").exists()


def test_folders_that_were_made_for_nothing_go_again(tmp_path: Path) -> None:
    with claimed(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "kept").write_text("")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["kept"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_refuses_nothing_and_clears_nothing_away(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    left = tmp_path / ".out.hqc-1234abcd"
    left.mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        write_manifest(folder, "hqc-test", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [left.name, "out"]


def test_a_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hqc.claims, "fcntl", None)
    with claimed(tmp_path / "out"), claimed(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / ".out.hqc-lock").symlink_to(tmp_path / "mine")
    with pytest.raises(ArtefactError, match="cannot be written"), claimed(tmp_path / "out"):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_what_was_moved_away_comes_back_for_readers_and_writers(tmp_path: Path) -> None:
    for act in (restore_interrupted, lambda path: claimed(path).__enter__()):
        folder = tmp_path / act.__name__.strip("<>")
        (folder / ".out.hqc-1234abcd.old").mkdir(parents=True)
        (folder / ".out.hqc-1234abcd.old" / "text").write_text("old")
        (folder / ".out.hqc-1234abcd").mkdir()
        act(folder / "out")
        assert (folder / "out" / "text").read_text() == "old"
        assert leftovers(folder / "out") == []
    restore_interrupted(tmp_path / "nowhere" / "out")
    assert not (tmp_path / "nowhere").exists()


def test_nothing_comes_back_over_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.hqc-1234abcd.old").mkdir()
    (tmp_path / ".out.hqc-1234abcd.old" / "text").write_text("old")
    with claimed(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_trees_of_any_modes_are_removed_and_links_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "text").write_text("precious")
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "file").write_text("")
    (tree / "a" / "link").symlink_to(tmp_path / "kept")
    for folder in (tree / "a" / "b", tree / "a", tree):
        folder.chmod(0o500)
    remove_tree(tree)
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "nothing")
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "text").read_text() == "precious"
    assert (tmp_path / "kept").stat().st_mode & 0o700 == 0o700
