"""The `torch-int8` runtime as a whole: every small model, by its name, through `load` and the command line."""

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
import zoo
from click.testing import CliRunner
from fusion_models import model
from integer_programs import quantised, relative, with_quantisers
from torch import nn

from hqc.capture import Source, trace
from hqc.cli import main
from hqc.commands.asking import Asked
from hqc.errors import EvaluationError, ExportError, RuntimeMissingError
from hqc.program import InputSpec, Origin, Program
from hqc.runtimes import load
from hqc.runtimes.integer.cpu import CpuSession, kernels, recordings, session
from hqc.runtimes.integer.cpu import tape as tape_module
from hqc.runtimes.integer.cpu.compiler import Library, compiled_passes
from hqc.runtimes.integer.cpu.own import OwnProducts
from hqc.runtimes.integer.cpu.products import LaterProduct
from hqc.runtimes.integer.cpu.recorder import record
from hqc.runtimes.integer.forms import integer_form
from hqc.runtimes.integer.layers import IntegerLayer
from hqc.storage import save_program

FUSED = ("three_products", "upsampled", "shift_of_image", "norm_kept", "skip", "gated", "one_wide_head")


@pytest.fixture(scope="module")
def cache(native_cache):
    return native_cache


def opened(program: Program, cache, batch: int = 3) -> tuple[torch.Tensor, CpuSession]:
    """The output of a batch of mixed timesteps, and the session."""
    found = CpuSession(program, cache=cache)
    return found(*program.example_inputs(batch, seed=7)), found


def check(original: Program, program: Program, cache) -> None:
    """What the integer program computes, of mixed timesteps and of one.

    A value on a rounding boundary may flip by a step, and in a random network that goes on to the output: of six
    samples four have no such value, and none is further away than quantisation is.
    """
    inputs = program.example_inputs(3, seed=7)
    run, reference, errors = CpuSession(program, cache=cache), integer_form(program).module(), []
    assert compiled_passes(cache).functions is None or run.report.tiles.endswith("recorded for every shape")
    for timesteps in (inputs[1], torch.full_like(inputs[1], 310)):
        given = (inputs[0], timesteps, *inputs[2:])
        found, wanted = run(*given), reference(*given)
        assert torch.equal(found, run._module(*given))  # node by node
        assert relative(found, wanted) <= relative(wanted, original.module()(*given))
        errors += [relative(a, b) for a, b in zip(found, wanted, strict=True)]
    assert sorted(errors)[3] <= 1e-5


MODELS = (*((name, "w4a4") for name in zoo.ZOO), *((name, "w8a8") for name in ("geometry", "odd_channels")))


@pytest.mark.parametrize(("name", "bits"), MODELS)
def test_it_computes_what_the_integer_program_computes(captured, cache, name: str, bits: str) -> None:
    check(captured(name), quantised(captured(name), bits), cache)


@pytest.mark.parametrize("name", FUSED)
def test_every_fusion(cache, name: str) -> None:
    check(model(name), quantised(model(name), "w4a4"), cache)


@pytest.mark.parametrize("kind", ["asymmetric", "mixed", "residual"])
def test_other_ranges_and_weights(captured, cache, kind: str) -> None:
    program = quantised(captured("cross_attention"), "w4a4", kind=kind)
    check(captured("cross_attention"), program, cache)


@pytest.mark.parametrize("name", ["geometry", "cross_attention"])
def test_oneDNN_s_products_are_calls_of_a_tape(captured, cache, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnProducts, "there", False)
    check(captured(name), quantised(captured(name), "w4a4"), cache)


def test_split_products_compute_the_same(captured, cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without VNNI: weights in halves where products could leave int16, against whole ones in torch."""
    monkeypatch.setattr(OwnProducts, "there", False)
    monkeypatch.setattr("hqc.runtimes.integer.cpu.operators.adds_in_int16", lambda: True)
    program = quantised(captured("two_sites"), "w8a8")
    split, run = opened(program, cache)
    assert relative(split, integer_form(program).module()(*program.example_inputs(3, seed=7))) <= 1e-5
    assert {m.packed.terms for m in run._module.modules() if isinstance(m, IntegerLayer)} == {2}


def test_without_a_compiler_the_plain_passes_run_and_the_report_says_so(
    captured, cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = quantised(captured("cross_attention"), "w4a4")
    native, first = opened(program, cache)
    monkeypatch.setattr(kernels, "compiled_passes", lambda cache: Library(None, "there is none of g++"))
    plain, second = opened(program, cache)
    said = "passes: plain torch: there is none of g++; calls: node by node (passes are plain torch)"
    assert second.report.text().splitlines()[-1].endswith(said)
    if compiled_passes(cache).functions is None:
        pytest.skip(compiled_passes(cache).said)
    assert "passes: compiled by" in first.report.text()
    assert relative(plain, native) <= 1e-3


def test_weights_are_held_once_and_the_report_counts_them(captured, cache) -> None:
    _, run = opened(quantised(captured("cross_attention"), "w4a4"), cache)
    layers = [m for m in run._module.modules() if isinstance(m, IntegerLayer)]
    assert all(layer.codes.numel() == 0 and layer.high is None for layer in layers)
    assert sum(run.report.weights.values()) == len(layers)
    assert run.report.weight_bytes > 0
    left_out = {"codes_from_products", "gate_in_product", "statistics_from_products", "take_wide_attention"}
    assert not left_out & {record.name for record in run.report.fusions}


def test_by_its_name_and_on_the_command_line(captured, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = quantised(captured("two_sites"), "w4a4")
    save_program(program, tmp_path / "q.hqc")
    found = load(tmp_path / "q.hqc", runtime="torch-int8", cache=tmp_path / "cache")
    assert found.runtime == "torch-int8"
    sample, timestep = program.example_inputs(2, seed=1)
    wanted = load(tmp_path / "q.hqc").session(sample, timestep)
    assert relative(found.as_unet()(sample, timestep).sample, wanted) <= 1e-5
    monkeypatch.setattr(Asked, "check_kind", lambda self, model: None)  # the model has no pipeline, which comes first
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    said = CliRunner().invoke(main, ["sample", str(tmp_path / "q.hqc"), "--runtime", "torch-int8"])
    assert said.exit_code == 2
    assert "runtime torch-int8: this torch was built without oneDNN" in said.stderr
    assert "Traceback" not in said.stderr


def test_what_cannot_run_there(captured, cache) -> None:
    with pytest.raises(RuntimeMissingError, match=r"runtime torch-int8: .*not quantised.*hqc ptq"):
        CpuSession(captured("two_sites"), cache=cache)
    with pytest.raises(RuntimeMissingError, match="runtime torch-int8: cannot run"):
        load("digits", runtime="torch-int8")


def test_asymmetric_codes_of_eight_bits_are_refused_by_its_name(captured, cache) -> None:
    integer = integer_form(quantised(captured("two_sites"), "w4a4"), "torch-int8")
    with pytest.raises(ExportError, match=r"runtime torch-int8: site conv has asymmetric activation codes 0…255"):
        CpuSession(with_quantisers(integer, 0, 255), cache=cache)
    assert CpuSession(with_quantisers(integer, -3, 12), cache=cache).inputs == integer.inputs


def test_every_shape_has_a_tape_and_the_last_ones_are_kept(captured, cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "MOST", 2)
    program = quantised(captured("cross_attention"), "w4a4")
    run = CpuSession(program, cache=cache)
    if run._recordings is None:
        pytest.skip(run.report.tiles)
    tapes, given = run._recordings, {batch: program.example_inputs(batch, seed=batch) for batch in (1, 2, 3)}
    first = tapes.tape(given[1])
    assert first.parts
    assert tapes.tape(given[2]) is not first
    assert tapes.tape(given[1]) is first  # used again, so that 2 goes next
    for batch in (3, 1):
        assert torch.equal(run(*given[batch]), run._module(*given[batch]))
    assert tapes.tape(given[1]) is first
    assert len(tapes._shapes) == 2


def recorded_session(program: Program, cache) -> CpuSession:
    run = CpuSession(program, cache=cache)
    if compiled_passes(cache).functions is None:
        pytest.skip(compiled_passes(cache).said)
    return run


def test_a_server_s_many_shapes_are_recorded_once_each(captured, cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hqc serve --max-batch 8` calls with up to 16 numbers of rows, in any order."""
    program, made = quantised(captured("two_sites"), "w4a4"), []

    def counted(module, functions, inputs):
        made.append(len(inputs[0]))
        return record(module, functions, inputs)

    monkeypatch.setattr(recordings, "record", counted)
    run = recorded_session(program, cache)
    for batch in (*range(1, 17), *range(1, 17)):
        run(*program.example_inputs(batch, seed=batch))
    assert sorted(made) == list(range(1, 17))


def test_other_shapes_do_not_wait_for_a_recording(captured, cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads with the same new shape wait for one recording of it; a shape that is known runs meanwhile."""
    program, begun, go_on, made = quantised(captured("two_sites"), "w4a4"), Event(), Event(), []
    run = recorded_session(program, cache)

    def slow(module, functions, inputs):
        made.append(len(inputs[0]))
        begun.set()
        assert go_on.wait(60)
        return record(module, functions, inputs)

    monkeypatch.setattr(recordings, "record", slow)
    given = {batch: program.example_inputs(batch, seed=1) for batch in (2, 3)}
    with ThreadPoolExecutor(3) as pool:
        try:
            new = [pool.submit(run, *given[3]) for _ in range(2)]
            assert begun.wait(60)
            known = pool.submit(run, *given[2]).result(60)  # tried as the session opened
        finally:
            go_on.set()
        assert torch.equal(known, run._module(*given[2]))
        assert all(torch.equal(found.result(60), run._module(*given[3])) for found in new)
    assert made == [3]


@pytest.mark.parametrize("error", [RuntimeError("needs a value"), KeyError("odd")])
def test_a_shape_that_cannot_be_recorded_runs_node_by_node(
    captured, cache, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It alone, and it is tried once."""
    program, tried = quantised(captured("two_sites"), "w4a4"), []
    run = recorded_session(program, cache)

    def refuses(module, functions, inputs):
        tried.append(len(inputs[0]))
        if len(inputs[0]) == 3:
            raise error
        return record(module, functions, inputs)

    monkeypatch.setattr(recordings, "record", refuses)
    for batch in (3, 4, 3):
        given = program.example_inputs(batch, seed=1)
        assert torch.equal(run(*given), run._module(*given))
        assert (run.tape(*given) is None) == (batch == 3)
    assert tried == [3, 4]


def test_what_torch_returns_is_given_back_when_nobody_reads_it(captured, cache, monkeypatch) -> None:
    """oneDNN's products return memory of their own: no call holds more than the few that live together."""
    monkeypatch.setattr(OwnProducts, "there", False)
    program = quantised(captured("cross_attention"), "w4a4")
    run = CpuSession(program, cache=cache)
    if run._recordings is None:
        pytest.skip(run.report.tiles)
    held, pop = [], dict.pop
    tape = run._recordings.tape(program.example_inputs(2, seed=1))
    assert tape.calls > 5
    assert not tape.own_threads

    class Counting(dict):
        def pop(self, *given):
            held.append(len(self))
            return pop(self, *given)

    made = tape_module._Memory.__init__

    def counting(self, size: int) -> None:
        made(self, size)
        self.results = Counting()

    monkeypatch.setattr(tape_module._Memory, "__init__", counting)
    run(*program.example_inputs(2, seed=1))
    assert 0 < max(held) < tape.calls / 2


@pytest.mark.parametrize("whose", ["hqc", "oneDNN"])
@pytest.mark.parametrize("name", ["cross_attention", "without_attention"])
def test_images_stay_channels_last(captured, cache, name: str, whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample is laid out anew once; from there on there are kernels and products alone, no copies between them."""
    if whose == "oneDNN":
        monkeypatch.setattr(OwnProducts, "there", False)
    program = quantised(captured(name), "w4a4")
    tape = recorded_session(program, cache).tape(*program.example_inputs(2))
    called = [part.function for part in tape.parts if isinstance(part, tape_module.Call)]
    copies = [i for i, function in enumerate(called) if function == torch.ops.aten.clone.default]
    assert len(copies) == 1
    assert all(isinstance(function, LaterProduct) for function in called[copies[0] + 1 :])


class _Labelled(nn.Module):
    """Looks up what a label adds to an image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1)
        self.table = nn.Embedding(4, 32)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        x = self.first(sample) + timestep[:, None, None, None] / 1000
        return self.last((x + self.table(label)[:, :, None, None]).relu())


def test_a_value_that_no_operator_takes_is_refused_by_its_node(cache) -> None:
    torch.manual_seed(3)
    images = InputSpec("sample", ("N", 4, 8, 8)), InputSpec("timestep", ("N",))
    source = Source(_Labelled(), (*images, InputSpec("label", ("N",), "int64", span=(0, 4))), Origin(source="labelled"))
    program = quantised(trace(source), "w4a4")
    run, (sample, timestep, label) = CpuSession(program, cache=cache), program.example_inputs(2, seed=1)
    assert torch.equal(run(sample, timestep, label), run._module(sample, timestep, label))
    with pytest.raises(EvaluationError, match=r"node 'embedding' .*cannot be computed"):
        run(sample, timestep, label + 99)


def test_a_graph_that_writes_its_input_runs_node_by_node(captured, cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise TypeError("aten.odd returns a part of a tensor of its own")

    monkeypatch.setattr(recordings, "record", refuses)
    program = quantised(captured("two_sites"), "w4a4")
    found, run = opened(program, cache)
    if compiled_passes(cache).functions is None:
        pytest.skip(compiled_passes(cache).said)
    assert run.report.tiles.endswith("node by node (aten.odd returns a part of a tensor of its own)")
    assert torch.equal(found, run._module(*program.example_inputs(3, seed=7)))


def test_sessions_run_from_several_threads(captured, cache) -> None:
    """What `hqc serve` does; a session holds nothing of a call."""
    program = quantised(captured("without_attention"), "w4a4")
    run = CpuSession(program, cache=cache)
    batches = [program.example_inputs(2, seed=seed) for seed in range(4)]
    wanted = [run(*inputs) for inputs in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda inputs: run(*inputs), batches * 2))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted * 2, strict=True))
    assert session.CpuSession is CpuSession
    assert json.dumps(run.report.to_dict())
