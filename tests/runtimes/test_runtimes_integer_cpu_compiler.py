"""The C++ of the `torch-int8` runtime: compiled once, kept whole, loaded from one's own folder alone."""

from pathlib import Path

import pytest

from hqc.runtimes.integer.cpu import compiler
from hqc.runtimes.integer.cpu.compiler import compiled_passes


@pytest.fixture
def small(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of a source that takes no time."""
    source = tmp_path / "seven.cpp"
    source.write_text('extern "C" int seven() { return 7; }\n')
    monkeypatch.setattr(compiler, "SOURCES", (source,))
    if not compiler._compiler(None):
        pytest.skip("no compiler")
    return tmp_path / "cache"


def opened(cache: Path, command: str | None = None) -> compiler.Library:
    found = compiled_passes.__wrapped__(cache, command)
    assert found.functions is not None, found.said
    assert found.functions.seven() == 7
    return found


def test_a_library_is_compiled_once_and_only_loaded_from_one_s_own_folder(small: Path) -> None:
    assert not opened(small).said.endswith("kept from before")
    (library,) = small.glob("*.so")
    written = library.stat().st_mtime_ns
    assert opened(small).said.endswith("kept from before")
    assert library.stat().st_mtime_ns == written
    shared = small.with_name("shared")
    shared.mkdir()
    shared.chmod(0o777)  # anybody could put a library there
    opened(shared)
    assert not list(shared.iterdir())


def test_without_a_compiler_there_is_a_reason(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled_passes(tmp_path, compiler="no-such-compiler").said == (
        "CXX names no-such-compiler, which is not there"
    )
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    compiled_passes.cache_clear()
    assert compiled_passes(tmp_path).said == "there is none of g++, c++, clang++"
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no such option: error' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: str(broken))
    compiled_passes.cache_clear()
    found = compiled_passes(tmp_path)
    assert found.functions is None
    assert found.said == "broken could not compile them (no such option: error)"
    compiled_passes.cache_clear()


@pytest.mark.parametrize("damage", ["cut", "changed", "without its sum", "no text"])
def test_a_damaged_library_is_compiled_again(small: Path, damage: str) -> None:
    """Before it is loaded: what is missing of one would end the process with SIGBUS."""
    small.mkdir()
    library, kept = compiler._library(compiler._compiler(None), "1", small)
    assert not kept
    whole, digest = library.read_bytes(), library.with_name(f"{library.name}.sha256")
    assert compiler._library(compiler._compiler(None), "1", small) == (library, True)
    if damage == "cut":
        library.write_bytes(whole[:1000])
    elif damage == "changed":
        library.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    elif damage == "no text":
        digest.write_bytes(b"\xff" * 64)
    else:
        digest.unlink()
    assert compiler._library(compiler._compiler(None), "1", small) == (library, False)
    assert library.read_bytes() == whole
    assert sorted(path.name for path in small.iterdir()) == [library.name, digest.name]


def test_a_compiler_may_have_words_behind_its_name(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CXX="g++ -DNAME=1" and CXX="ccache g++" are usual; options make another library."""
    (path,) = compiler._compiler(None)
    (launcher := small.with_name("my launcher")).write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    said = opened(small).said
    assert opened(small, f"{path} -DNAME=1").said == said
    assert opened(small, f"'{launcher}' {path}").said == said
    assert len(list(small.glob("*.so"))) == 3
    assert compiler._compiler(str(launcher)) == (str(launcher),)
    for odd in ("no-such-compiler -m64", "'g++", "  "):
        assert compiler._compiler(odd) == ()
    monkeypatch.setenv("CXX", f"{path} --no-such-option")
    found = compiled_passes.__wrapped__(small)
    assert found.functions is None
    assert found.said.startswith(f"{Path(path).name} --no-such-option could not compile them (")
