"""Shared fixtures: one thread, long files first, the GPU's state in the header, tiny programs captured once."""

import gc
import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from hqc.capture import trace
from hqc.program import Program

# Third-party warnings, each with the text that it has; everything else is an error (pyproject.toml).
THIRD_PARTY_WARNINGS = (
    # torch.export's own deprecations, raised from inside torch.
    "ignore:.*is deprecated.*LeafSpec.*:FutureWarning",
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning",
    # torch.onnx and torch.jit, on import.
    "ignore:`torch\\.jit\\..*` is deprecated:DeprecationWarning",
    # SWIG types in compiled extensions.
    "ignore:builtin type (SwigPyPacked|SwigPyObject|swigvarlink) has no __module__:DeprecationWarning",
)

SECONDS: Mapping[str, int] = {
    "kernels/test_kernels_interpreted.py": 80,
    "recipes/test_recipes_methods.py": 75,
    "test_cli.py": 70,
    "test_docs.py": 45,
    "serving/test_serving_bits.py": 45,
    "export/test_export_tensorrt.py": 45,
    "test_cli_prompts.py": 35,
    "runtimes/test_runtimes_integer_graph.py": 33,
    "runtimes/test_runtimes_cpu_session.py": 40,
    "runtimes/test_runtimes_integer_cpu.py": 20,
    "capture/test_capture_ldm.py": 33,
    "kernels/test_kernels_compile.py": 28,
    "passes/test_pass_contracts.py": 27,
    "export/test_export_denoisers.py": 27,
    "training/test_training_processes.py": 26,
    "engines/test_engines_programs.py": 25,
    "engines/test_engines_ldm4.py": 25,
    "test_api.py": 25,
    "capture/test_capture_hub.py": 25,
    "evaluation/test_eval_pipelines.py": 25,
    "serving/test_serving_pipelines.py": 25,
    "export/test_export_openvino.py": 25,
    "test_quiet.py": 24,
    "passes/test_pass_single_key.py": 24,
    "recipes/test_recipe_quest.py": 23,
    "evaluation/test_bench.py": 22,
    "integrations/test_integrations_diffusers.py": 22,
    "capture/test_capture_sizes.py": 21,
    "evaluation/test_comparison.py": 20,
    "test_cli_fuzz.py": 20,
    "export/test_export_asymmetric.py": 20,
    "runtimes/test_runtimes_pipelines.py": 20,
    "training/test_training_reconstruct.py": 20,
    "export/test_export_runtimes_agree.py": 15,
    "export/test_export_zoo.py": 15,
    "evaluation/test_comparison_parts.py": 14,
    "test_cli_outputs.py": 14,
    "test_cli_pipelines.py": 14,
    "capture/test_capture_denoisers.py": 13,
    "test_cli_analyze.py": 13,
    "test_cli_loras.py": 13,
    "evaluation/test_analysis.py": 13,
    "sampling/test_sampling_prompts.py": 12,
    "sampling/test_sampling_prompt_encoding.py": 12,
    "test_structure.py": 12,
    "lite/test_lite_commands.py": 12,
    "export/test_export_names.py": 12,
    "recipes/test_plan_file.py": 12,
    "test_cli_options.py": 11,
    "styles/test_styles_reading.py": 11,
    "test_restoration.py": 11,
    "models/test_training_script.py": 11,
    "evaluation/test_bench_architectures.py": 10,
    "capture/test_capture_autoencoders.py": 9,
    "export/test_export_pipeline.py": 9,
    "export/test_export_style.py": 9,
    "search/test_search_run.py": 9,
    "runtimes/test_runtimes_integer_fusions.py": 9,
    "evaluation/test_layer_errors.py": 9,
    "evaluation/test_bench_gpu.py": 9,
    "runtimes/test_runtimes_load.py": 8,
    "search/test_search_joint.py": 8,
    "runtimes/test_runtimes_unet.py": 8,
    "recipes/test_recipes.py": 8,
    "training/test_training_module.py": 8,
    "models/test_digits.py": 8,
    "capture/test_capture.py": 8,
    "triton_server/test_triton_server.py": 7,
    "export/test_export_functions.py": 7,
    "serving/test_serving_browser.py": 7,
    "runtimes/test_runtimes_integer_asymmetric.py": 7,
    "kernels/test_kernels_tiles.py": 7,
    "test_memory.py": 6,
    "export/test_export_attention.py": 5,
    "test_cli_restore.py": 5,
}
"""Of the files that take long. They run first, so that no process is left with one of them while the other waits."""

TOGETHER: Mapping[str, str] = {
    file: what
    for what, files in {
        "denoisers": (
            *("capture/test_capture_denoisers.py", "export/test_export_denoisers.py", "export/test_export_names.py"),
            *("integrations/test_integrations_diffusers.py", "passes/test_pass_single_key.py"),
            *("passes/test_pass_patterns.py", "runtimes/test_runtimes_integer_fusions.py"),
            *("runtimes/test_runtimes_pipelines.py", "sampling/test_sampling_prompts.py", "test_units.py"),
        ),
        "pipelines": (
            *("evaluation/test_eval_pipelines.py", "lite/test_lite_commands.py", "lite/test_lite_folders.py"),
            *("lite/test_lite_pipeline.py", "sampling/test_sampling_prompt_encoding.py"),
            *("serving/test_serving_pipelines.py", "test_cli_pipelines.py", "test_cli_prompts.py"),
            *("test_cli_restore.py", "test_restoration.py"),
        ),
    }.items()
    for file in files
}
"""Files of which one process runs all: what they share takes seconds to capture."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until all is collected
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start: two of them share two cores
    os.environ["HQC_PROGRESS"] = "0"  # what standard error holds must not depend on the machine's speed
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m gpu` imports nothing but what may hold such a test: a machine with a GPU may lack the packages of others."""
    if config.option.markexpr.strip() != "gpu":
        return None
    return None if may_be_on_gpu(collection_path) else True


MARKS_GPU = re.compile(r"^(pytestmark = |@|.*\bmarks=|.*\badd_marker\()pytest\.mark\.gpu\b", re.MULTILINE)


@cache
def may_be_on_gpu(path: Path) -> bool:
    """Whether a test file, or one in a folder, gives the mark itself or lies beside a conftest that does."""
    if path.is_dir():
        return any(map(may_be_on_gpu, path.rglob("test_*.py")))
    files = (path, path.with_name("conftest.py"))
    return any(MARKS_GPU.search(file.read_text(encoding="utf-8")) for file in files if file.is_file())


def pytest_report_header() -> str:
    if torch.cuda.is_available():
        return f"gpu: {torch.cuda.get_device_name()}, tests marked gpu run"
    return "gpu: no CUDA device, tests marked gpu are skipped"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: -SECONDS.get(item.path.relative_to(Path(__file__).parent).as_posix(), 0))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.stash[_GPU_TESTS] = [item.nodeid for item in on_gpu]
    assert all(may_be_on_gpu(item.path) for item in on_gpu), "a mark that MARKS_GPU does not find: see -m gpu"
    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: torch finds no CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`: a file at a time, or the files of TOGETHER."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file.removeprefix("tests/"), file)

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """What has been imported stays: to look through it for garbage again and again is a seventh of all the time."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000, 50, 50)


_GPU_TESTS = pytest.StashKey[list[str]]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of `pytest -n` hands on what it has collected."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["gpu_tests"] = session.config.stash.get(_GPU_TESTS, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Every process collects the same tests."""
    if found := getattr(node, "workeroutput", {}).get("gpu_tests"):
        node.config.stash[_GPU_TESTS] = found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    names = config.stash.get(_GPU_TESTS, [])
    if names:
        state = "ran" if torch.cuda.is_available() else "skipped, no CUDA device"
        terminalreporter.section(f"gpu tests: {len(names)} {state}")
        for name in names:
            terminalreporter.line(name)


@cache
def captured_program(name: str) -> Program:
    """The zoo's model of this name, or digits, captured once a session; never change it in place."""
    import zoo  # this folder is on the path while its tests run

    if name == "digits":
        return trace(name)
    return trace({**zoo.ZOO, **zoo.SHAPES, **zoo.WIDE}[name]())


@pytest.fixture(scope="session")
def captured() -> Callable[[str], Program]:
    """captured("two_sites") is a Program at stage captured."""
    return captured_program


@pytest.fixture(scope="session")
def native_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where code that is compiled for this CPU lies: once for all processes of a run."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "native"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """golden(path, text) compares text with the file; `pytest --update-golden` writes it instead."""
    update = request.config.getoption("--update-golden")

    def compare(path: Path, text: str) -> None:
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.is_file(), f"{path} is missing; write it with pytest --update-golden and read it"
        assert text == path.read_text(encoding="utf-8"), f"differs from {path.name}; see pytest --update-golden"

    return compare
