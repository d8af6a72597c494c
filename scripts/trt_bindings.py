"""Makes TensorRT's Python bindings importable without a GPU and without TensorRT, for the tests of the plugins.

    python scripts/trt_bindings.py FOLDER [VERSION …]
    HQC_TRT_BINDINGS=FOLDER python -m pytest tests/plugins/test_plugins_bindings.py

The full libraries are not on the public index. The bindings are, and the lean runtime, which holds the plugin registry;
the few other functions that the bindings link to come from three libraries of a few lines that return nothing. So the
registry, the plugin classes and NVIDIA's Python code around them are the real ones; nothing can be built or run.

Downloads about 46 MB a version; needs pip, gcc and Linux on x86-64.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

STUBS = {
    "nvinfer": "void* createInferBuilder_INTERNAL(void* a, int b) { return 0; }\n"
    "void* getBuilderPluginRegistry(int a) { return 0; }\n",
    "nvinfer_plugin": "int initLibNvInferPlugins(void* a, char const* b) { return 1; }\n",
    "nvonnxparser": "void* createNvOnnxParser_INTERNAL(void* a, void* b, int c) { return 0; }\n"
    "void* createNvOnnxParserRefitter_INTERNAL(void* a, void* b, int c) { return 0; }\n"
    "int getNvOnnxParserVersion(void) { return 0; }\n",
}


@dataclass(frozen=True)
class Release:
    """Bindings and a lean runtime that they work with: a minor version takes the library of a later one."""

    version: str
    lean: str
    suffix: str = "cu13"

    @property
    def major(self) -> str:
        """As in libnvinfer.so.10."""
        return self.version.split(".")[0]


RELEASES = (
    Release("10.8.0.43", lean="10.16.1.11", suffix="cu12"),
    Release("10.16.1.11", lean="10.16.1.11"),
    Release("11.4.0.106", lean="11.4.0.106"),
)
"""The last without plugins ahead of time, the last of 10, and 11."""


def download(package: str, version: str, folder: Path, *, source: bool) -> Path:
    """A wheel, or a source archive, of a package, and nothing that it depends on."""
    kind = ["--no-binary", ":all:", "--no-build-isolation"] if source else ["--only-binary", ":all:"]
    place = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "--dest", str(place)]
    subprocess.run([*command, f"{package}=={version}"], check=True)
    return next(place.iterdir())


def prepare(release: Release, folder: Path) -> Path:
    """FOLDER/VERSION/{tensorrt, tensorrt_bindings, lib}: the first two for PYTHONPATH, the last for LD_LIBRARY_PATH."""
    site = folder / release.version
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        bindings = download(f"tensorrt-{release.suffix}-bindings", release.version, work, source=False)
        lean = download("tensorrt-lean-cu13-libs", release.lean, work, source=False)
        package = download(f"tensorrt-{release.suffix}", release.version, work, source=True)
        for archive in (bindings, lean):
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(work / "wheels")
        with tarfile.open(package) as sources:
            sources.extractall(work / "source", filter="data")
        shutil.rmtree(site, ignore_errors=True)
        site.mkdir(parents=True)
        shutil.copytree(work / "wheels" / "tensorrt_bindings", site / "tensorrt_bindings")
        shutil.copytree(next((work / "source").glob("*/tensorrt")), site / "tensorrt")
        (site / "lib").mkdir()
        runtime = f"libnvinfer_lean.so.{release.major}"
        shutil.copy(work / "wheels" / "tensorrt_lean_libs" / runtime, site / "lib" / runtime)
    for name, text in STUBS.items():
        compile_stub(site / "lib", f"lib{name}.so.{release.major}", text, runtime)
    return site


def compile_stub(folder: Path, library: str, text: str, runtime: str) -> None:
    """One library; what it lacks comes from the lean runtime beside it."""
    source = folder / f"{library}.c"
    source.write_text(text, encoding="utf-8")
    linked = [f"-L{folder}", "-Wl,--no-as-needed", f"-l:{runtime}", "-Wl,-rpath,$ORIGIN"]
    command = ["gcc", "-shared", "-fPIC", "-w", "-o", str(folder / library), str(source), f"-Wl,-soname,{library}"]
    subprocess.run([*command, *linked], check=True)
    source.unlink()


def main() -> None:
    """Prepares the versions that are asked for, or all."""
    known = {release.version: release for release in RELEASES}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"some of {', '.join(known)} (default: all)")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.versions) - known.keys()):
        parser.error(f"unknown version {', '.join(unknown)}; there are {', '.join(known)}")
    for version in arguments.versions or known:
        print(f"{version}: {prepare(known[version], arguments.folder)}")


if __name__ == "__main__":
    main()
