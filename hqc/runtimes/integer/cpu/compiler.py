"""The C++ of this folder compiled once for this machine, and kept.

    CACHE/passes-KEY.so           key = sha256(sources, compiler and version, options, instruction sets)
    CACHE/passes-KEY.so.sha256    of the library: a damaged one would end the process, and is compiled again

That takes a few seconds. Without a compiler there is a reason instead of a library, and plain torch runs instead.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hqc.atomic import sync
from hqc.runtimes.ort_cache import instruction_sets
from hqc.stages import doing

__all__ = ["COMPILERS", "Library", "compiled_passes", "native_cache"]

COMPILERS = ("g++", "c++", "clang++")
"""What is looked for, unless CXX names another."""
SOURCES = tuple(Path(__file__).with_name(f"{name}.cpp") for name in ("passes", "products", "attention", "team", "run"))
_HEADERS = tuple(Path(__file__).with_name(f"{name}.h") for name in ("steps", "team", "vectors"))
OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp")
_SECONDS = 300


@dataclass(frozen=True)
class Library:
    """The compiled passes; None with the reason in `said` where there are none."""

    functions: ctypes.CDLL | None
    said: str


def native_cache() -> Path:
    """`$XDG_CACHE_HOME/hqc/native`, or `~/.cache/hqc/native`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "hqc" / "native"


@lru_cache(maxsize=8)
def compiled_passes(cache: Path | None = None, compiler: str | None = None) -> Library:
    """The passes of this machine, compiled on the first call; kept in `cache`.

    compiler: None takes CXX's, else the first of `COMPILERS` that is there; options may follow its name.
    """
    found = _compiler(compiler)
    if not found:
        return Library(None, _no_compiler(compiler))
    folder = native_cache() if cache is None else cache
    try:
        version = _run([*found, "--version"]).splitlines()[0]
        with _usable(folder) as usable:
            library, kept = _library(found, version, usable)
            functions = ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return Library(None, f"{_named(found)} could not compile them ({_reason(error)})")
    return Library(functions, f"compiled by {version}{', kept from before' if kept else ''}")


def _compiler(named: str | None) -> tuple[str, ...]:
    """The words of its command, the program's path first; none where it is not there."""
    wanted = named or os.environ.get("CXX")
    return next(filter(None, map(_command, [wanted] if wanted else COMPILERS)), ())


def _command(text: str) -> tuple[str, ...]:
    """`ccache g++` or `g++ -m64` as its words, or a path, which may have blanks; none where it is not there."""
    if path := shutil.which(text):
        return (path,)
    try:
        name, *others = shlex.split(text)
    except ValueError:  # no words, or a quote that does not end
        return ()
    path = shutil.which(name)
    return (path, *others) if path else ()


def _named(command: Sequence[str]) -> str:
    """A command without the folder of its program."""
    return " ".join([Path(command[0]).name, *command[1:]])


def _no_compiler(named: str | None) -> str:
    wanted = named or os.environ.get("CXX")
    return f"CXX names {wanted}, which is not there" if wanted else f"there is none of {', '.join(COMPILERS)}"


@contextmanager
def _usable(folder: Path) -> Iterator[Path]:
    """The cache folder if it is this user's alone, else a temporary one: code is loaded from no one else's."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        own = _is_own(folder) and os.access(folder, os.W_OK)
    except OSError:
        own = False
    if own:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="hqc-native-") as temporary:  # a loaded library stays mapped
        yield Path(temporary)


def _is_own(path: Path) -> bool:
    """Whether a path belongs to this user, and nobody else may write it."""
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _library(compiler: Sequence[str], version: str, folder: Path) -> tuple[Path, bool]:
    """(the library's file, whether it was there before)."""
    about = [
        *(source.read_bytes() for source in (*SOURCES, *_HEADERS)),
        version.encode(),
        " ".join([*compiler[1:], *OPTIONS]).encode(),
        instruction_sets().encode(),
    ]
    key = hashlib.sha256(b"\0".join(about)).hexdigest()[:32]
    library = folder / f"passes-{key}.so"
    if _intact(library):
        return library, True
    with doing("compiling passes for this CPU"), tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
        whole = Path(scratch) / "passes.so"
        parts = [Path(scratch) / f"{source.stem}.o" for source in SOURCES]
        for source, part in zip(SOURCES, parts, strict=True):
            _run([*compiler, *OPTIONS, "-c", str(source), "-o", str(part)])
        # Linked without OpenMP: its functions are those of the library that torch has loaded, with the same threads.
        _run([*compiler, "-shared", *map(str, parts), "-o", str(whole)])
        whole.chmod(0o700)
        _keep(whole, library)
    return library, False


def _sum_of(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _keep(whole: Path, library: Path) -> None:
    """Gives a library its name, its sum first: killed in between, or beside another that does the same, it is compiled
    once more."""
    digest = _sum_of(whole)
    digest.write_text(hashlib.sha256(whole.read_bytes()).hexdigest(), encoding="ascii")
    for written, kept in ((digest, _sum_of(library)), (whole, library)):
        sync(written)
        written.replace(kept)
    sync(library.parent)


def _intact(library: Path) -> bool:
    """Whether a library is there, of this user, and as it was written."""
    try:
        wanted = _sum_of(library).read_text(encoding="ascii")
        return _is_own(library) and hashlib.sha256(library.read_bytes()).hexdigest() == wanted
    except (OSError, ValueError):  # there is none, or its sum is no text
        return False


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if "error" in line] or [f"status {done.returncode}"]
        raise OSError(lines[0][:120])
    return done.stdout


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
