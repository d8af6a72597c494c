"""What memory is available according to the machine and to its control groups, and what is said when it is short."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hqc import memory
from hqc.errors import MemoryShortError
from hqc.memory import (
    activation_bytes,
    available_bytes,
    bytes_text,
    require_memory,
    return_free_memory,
    stored_parameters,
    trace_bytes,
    training_bytes,
    unet_activation_bytes,
)
from hqc.program import Program

GIB = 2**30


def system(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


MACHINE = {"proc/meminfo": f"MemTotal:  {16 * 2**20} kB\nMemAvailable:  {8 * 2**20} kB"}


def test_the_machine_alone(tmp_path: Path) -> None:
    assert available_bytes(system(tmp_path, MACHINE)) == 8 * GIB


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None


def test_this_machine_says_something() -> None:
    found = available_bytes()
    assert found is None or 0 < found < 2**50


def group(folder: str, limit: object, use: int, cache: int = 0) -> dict[str, object]:
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": use,
        f"{folder}/memory.stat": f"anon {use - cache}\ninactive_file {cache}",
    }


def test_version_2_control_groups_up_to_the_root(tmp_path: Path) -> None:
    root = system(tmp_path, MACHINE | {"proc/self/cgroup": "0::/a/b"})
    assert available_bytes(root) == 8 * GIB
    system(root, group("sys/fs/cgroup/a/b", "max", GIB))
    assert available_bytes(root) == 8 * GIB
    system(root, group("sys/fs/cgroup/a", 5 * GIB, 3 * GIB, GIB))
    assert available_bytes(root) == 3 * GIB  # cached files are dropped when memory is short
    system(root, group("sys/fs/cgroup", 2 * GIB, GIB))
    assert available_bytes(root) == GIB
    system(root, group("sys/fs/cgroup/a/b", 1, GIB))
    assert available_bytes(root) == 0


def test_version_1_control_groups(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/job",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": 4 * GIB,
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": 3 * GIB,
        "sys/fs/cgroup/memory/job/memory.stat": f"total_inactive_file {GIB}",
    }
    assert available_bytes(system(tmp_path, MACHINE | files)) == 2 * GIB


@pytest.mark.parametrize("content", ["", "MemAvailable", "MemAvailable: x kB", "a:b:c:d"])
def test_files_that_say_something_else(content: str, tmp_path: Path) -> None:
    root = system(tmp_path, {"proc/meminfo": content, "proc/self/cgroup": content or "nonsense"})
    assert available_bytes(root) is None


def test_short_memory_is_said_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HQC_IGNORE_MEMORY", raising=False)
    monkeypatch.setattr(memory, "available_bytes", lambda: 3 * 10**9)
    require_memory("this", 3 * 10**9)
    with pytest.raises(MemoryShortError) as caught:
        require_memory("quantising x.hqc", 3 * 10**9 + 1)
    assert str(caught.value) == (
        "quantising x.hqc: needs about 3.0 GB of memory and 3.0 GB are available. Use a smaller batch, close other "
        "programs, or take a larger machine; HQC_IGNORE_MEMORY=1 goes on anyway."
    )
    with pytest.raises(MemoryShortError, match="Take --calib-size 2; HQC_IGNORE_MEMORY=1 goes on anyway"):
        require_memory("x", 10**12, "Take --calib-size 2")
    monkeypatch.setenv("HQC_IGNORE_MEMORY", "0")
    with pytest.raises(MemoryShortError):
        require_memory("x", 10**12)
    monkeypatch.setenv("HQC_IGNORE_MEMORY", "1")
    require_memory("x", 10**12)
    monkeypatch.delenv("HQC_IGNORE_MEMORY")
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    require_memory("x", 10**12)


@given(st.integers(0, 10**15))
def test_bytes_are_read_back_within_their_last_digit(count: int) -> None:
    number, unit = bytes_text(count).split()
    size = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}[unit]
    assert abs(float(number) * size - count) <= 0.05 * size + 1e-9 * count


def test_activations_grow_with_the_batch_and_the_side() -> None:
    config = {"block_out_channels": (32, 64), "layers_per_block": 2, "sample_size": 8}
    one = unet_activation_bytes(config, 1)
    # Skips: 3 of [32, 8, 8] and 3 of [64, 4, 4]; working set: 12 of the larger.
    assert one == 4 * (3 * 32 * 64 + 3 * 64 * 16 + 12 * 32 * 64)
    assert unet_activation_bytes(config, 3) == 3 * one
    assert unet_activation_bytes(config | {"sample_size": (16, 8)}, 1) == 2 * one


def test_the_estimates_of_tracing_cover_what_was_measured() -> None:
    """Peak resident memory above the imports, `hqc trace arch:…`: 2.11 GB for LDM-4, 1.53 GB for LDM-8."""
    ldm4 = {"block_out_channels": (192, 384, 576, 960), "layers_per_block": 2, "sample_size": 64}
    ldm8 = {"block_out_channels": (192, 384, 384, 768, 768), "layers_per_block": 2, "sample_size": 32}
    assert 2.11e9 < trace_bytes(400_920_579, ldm4) < 1.3 * 2.11e9
    assert 1.53e9 < trace_bytes(294_966_916, ldm8) < 1.3 * 1.53e9


def test_activations_of_a_graph_are_its_live_values(captured: Callable[[str], Program]) -> None:
    from torch import fx

    graph = fx.Graph()
    x = graph.placeholder("sample")
    a = graph.call_function(sum, (x,))  # x, a
    b = graph.call_function(sum, (x,))  # x, a, b: then x is done
    c = graph.call_function(sum, (a, b))  # a, b, c
    weight = graph.get_attr("weight")
    graph.output(c)
    for node, shape in ((x, ("N", 10)), (a, ("2*N", 10)), (b, ("N", 5)), (c, ("N", 1)), (weight, (10**9,))):
        node.meta = {"shape": shape, "dtype": "float32"}
    assert activation_bytes(graph, 4) == 3 * 4 * 4 * (10 + 20 + 5)
    a.meta["dtype"] = "int8"
    assert activation_bytes(graph, 4) == 3 * 4 * (4 * 10 + 20 + 4 * 5)

    program = captured("cross_attention")
    one, two = (activation_bytes(program.graph, batch) for batch in (1, 2))
    assert 0 < one < two <= 2 * one


def test_quantising_says_what_it_needs_before_it_starts(
    captured: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hqc import api
    from hqc.sampling import synthetic_task

    program = captured("cross_attention")
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    monkeypatch.setattr("hqc.recipes.run._one", None)  # nothing has begun
    with pytest.raises(MemoryShortError, match=r"calibrating on 16 images: needs about .* Take fewer calibration"):
        api.ptq(program, task=synthetic_task(program))


def test_training_says_what_it_needs_before_it_starts(
    captured: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hqc import api
    from hqc.sampling import synthetic_task

    program = captured("cross_attention")
    one, two = (training_bytes(program, rows) for rows in (1, 2))
    assert 4 * program.size_bytes() < one < two < 2 * one
    assert activation_bytes(program.graph, 8) < training_bytes(program, 8)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    monkeypatch.setattr("hqc.recipes.run._one", None)  # nothing has begun
    settings = {"distil.batch_size": 3, "calibrate_activations.samples": 1}
    with pytest.raises(MemoryShortError, match=r"training on batches of 3: needs about .* Take a smaller --batch-size"):
        api.qat(program, "hq-dm", task=synthetic_task(program), settings=settings)


def test_the_estimate_of_training_covers_what_was_measured(captured: Callable[[str], Program]) -> None:
    """Resident memory above the start of `hqc qat digits.hqc`, batches of 4, 16 and 48 with guidance."""
    program = captured("digits")
    for rows, measured in ((8, 94e6), (32, 180e6), (96, 442e6)):
        assert measured < training_bytes(program, rows) < 1.3 * measured


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("analyze", "--calib-size", "3", "-o", "r.html"), "analysing on batches of 3: needs about "),
        (("analyze", "--batch-size", "2", "-o", "r.html"), "analysing on batches of 2: needs about "),
        (("compare", "SAME", "--inputs", "noise"), "comparing on 8 samples: needs about "),
    ],
)
def test_looking_into_a_program_says_what_it_needs(
    command: tuple[str, ...],
    said: str,
    captured: Callable[[str], Program],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from click.testing import CliRunner

    from hqc.cli import main
    from hqc.storage import save_program

    save_program(captured("cross_attention"), tmp_path / "p.hqc")
    monkeypatch.chdir(tmp_path)
    # Enough to load the program and call it once, which says what it needs by itself.
    monkeypatch.setattr(memory, "available_bytes", lambda: 150_000)
    name, *options = ("p.hqc" if word == "SAME" else word for word in command)
    more = ["--synthetic"] if name == "analyze" else []
    result = CliRunner(catch_exceptions=False).invoke(main, [name, "p.hqc", *options, *more])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"hqc: {said}")
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["p.hqc"]


def test_a_folder_is_counted_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import save_file
    from zoo import ZOO

    from hqc.capture import find_source

    unet: Any = ZOO["cross_attention"]().module.unet
    unet.save_pretrained(tmp_path)
    wanted = sum(parameter.numel() for parameter in unet.parameters())
    assert stored_parameters(tmp_path) == wanted
    save_file({"x": torch.zeros(9)}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")  # a variant: not loaded
    assert stored_parameters(tmp_path) == wanted
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(MemoryShortError, match="needs about 4"):
        find_source(str(tmp_path))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    assert stored_parameters(tmp_path) == 0


def test_free_memory_is_returned_when_a_process_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection is slow: it is not repeated while the process stays as large as it was."""
    sizes, collected = iter((900, 1100, 1050, 1200, 1310, 1300, 1000, 1250, 1260, 1200, 5000, 4900, 4900, 4900)), []
    monkeypatch.setattr("hqc.memory._resident_after", 0)
    monkeypatch.setattr("hqc.memory.resident_bytes", lambda: next(sizes) * 2**20)
    monkeypatch.setattr("gc.collect", lambda: collected.append(None))

    def returned() -> bool:
        before = len(collected)
        return_free_memory()
        return len(collected) > before

    # 900: below 1 GiB. 1100: large, 1050 is left. 1200: grown by 150. 1310: by 260, 1300 is left.
    assert [returned() for _ in range(4)] == [False, True, False, True]
    # 1000: smaller than before, and that counts from now on. 1250: by 250. 1260: by 260.
    assert [returned() for _ in range(3)] == [False, False, True]
    # Beyond 4 GiB memory matters more than a second.
    assert [returned() for _ in range(2)] == [True, True]
