"""LoRAs from files beside sites: what they read, what they compute, at every stage and behind every rewrite."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lora_files import layers_of, merged_by_hand, save_lora, tensors

from hqc.api import attach_loras, merge_loras, ptq, task_of
from hqc.checking import check_calls
from hqc.errors import ArtefactError, PassError, TrainingError
from hqc.passes import (
    AttachBranch,
    AttachLora,
    AttachStyle,
    DropSingleKeyAttention,
    FreezeIntegers,
    InsertHadamard,
    InsertQdq,
    InsertSmoothing,
    MergeStyle,
    PackInt4,
    RotateWeights,
    SelectLayers,
    SplitConcat,
    SplitDigits,
    SplitSigns,
)
from hqc.pipeline import Pass, run_pass, run_pipeline
from hqc.program import Program, Stage, copy_graph
from hqc.storage import load_program, save_program
from hqc.structure import site_problems

Captured = Callable[[str], Program]
MODELS = ["two_sites", "geometry", "shared_weights", "shared_input", "cross_attention"]
QUANTISED: tuple[Pass, ...] = (SelectLayers(), InsertHadamard(block=16), InsertQdq((0.0, 500.0)))


@pytest.fixture
def lora(tmp_path: Path) -> Callable[..., str]:
    """lora(program): a file with a LoRA of every layer of it."""

    def save(program: Program, name: str = "a", seed: int = 3) -> str:
        return str(save_lora(tmp_path / f"{name}.safetensors", tensors(layers_of(program, seed=seed), "bare")))

    return save


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_every_sample_has_its_own_scale(captured: Captured, lora: Callable[..., str], name: str) -> None:
    """On the float program: sample n is that of the weights W + s[n]·delta, whatever stride, dilation and padding."""
    program = captured(name)
    attached = attach_loras(program, [lora(program)])
    args, scales = program.example_inputs(3), torch.tensor([0.0, 1.0, -0.7])
    found = attached.module()(*args, scales)
    for sample, scale in enumerate(scales.tolist()):
        wanted = merged_by_hand(program, layers_of(program), scale).module()(*args)[sample]
        close(found[sample], wanted)
    assert torch.equal(found[0], program.module()(*args)[0])


def _by_hand(program: Program, site: str, x: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · up(down(x)) of a site of `two_sites`."""
    layer = layers_of(program)[site]
    if layer.down.ndim == 2:
        return scale * (x @ layer.down.T @ layer.up.T)
    first = torch.nn.functional.conv2d(x, layer.down, padding=1)
    return scale * torch.nn.functional.conv2d(first, layer.up)


CHAINS: dict[str, tuple[Pass, ...]] = {
    "rotated": QUANTISED,
    "rotated weights": (SelectLayers(), InsertHadamard(block=16, weights=True, kind="regular"), InsertQdq((0.0,))),
    "smoothed with a branch": (SelectLayers(), InsertSmoothing(shift=True), AttachBranch(rank=2), InsertQdq((0.0,))),
    "asymmetric": (SelectLayers(), InsertQdq((0.0,), activation="asymmetric", weight="residual")),
    "in groups": (
        SelectLayers(),
        InsertSmoothing(),
        InsertQdq((0.0,), "dynamic", weight_group=16, activation_group=16),
    ),
    "a learnt LoRA": (*QUANTISED, AttachLora(rank=2)),
}


def filled(program: Program) -> Program:
    """With factors, shifts, branches and LoRAs that are not those of the start."""
    generator, state = torch.Generator().manual_seed(7), dict(program.state)
    for name, value in state.items():
        kind = name.rpartition(".")[2]
        if kind == "smoothing":
            state[name] = 0.5 + torch.rand(value.shape, generator=generator)
        elif kind in ("shift", "branch_up", "branch_down", "lora_b"):
            state[name] = 0.1 * torch.randn(value.shape, generator=generator)
        elif kind == "activation_scale_table":
            state[name] = value * 0.3
    return program.evolve(state=state)


@pytest.mark.parametrize("chain", CHAINS)
def test_it_reads_the_float_activation_before_everything(
    captured: Captured, lora: Callable[..., str], chain: str
) -> None:
    """The first layer's input is known: what is added is up(down(x)) of x itself, not smoothed, rotated or rounded."""
    plain = filled(run_pipeline(captured("two_sites"), CHAINS[chain]))
    file = lora(captured("two_sites"))
    attached = attach_loras(plain, [f"s={file}"])
    sample, timestep = plain.example_inputs(2)
    got = _value_of(attached, "conv", (sample, timestep, torch.tensor([0.5, 0.5])))
    before = _value_of(plain, "conv", (sample, timestep))
    x = sample + (timestep / 1000).view(-1, 1, 1, 1)
    close(got - before, _by_hand(captured("two_sites"), "conv", x, 0.5))
    assert not site_problems(attached)
    check_calls(attached)


def _value_of(program: Program, site: str, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What follows a site reads."""
    from hqc.export.reference import evaluate
    from hqc.sites import end_of

    places = [node for node in program.graph.nodes if node.op == "placeholder"]
    return evaluate(program, end_of(dict(program.sites())[site]), dict(zip(places, args, strict=True)))


@pytest.mark.parametrize("chain", [name for name in CHAINS if name != "in groups"])  # which have no integer products
def test_freezing_and_integer_products_leave_it_as_it_is(
    captured: Captured, lora: Callable[..., str], chain: str
) -> None:
    from hqc.passes import MergeLora

    program = attach_loras(filled(run_pipeline(captured("two_sites"), CHAINS[chain])), [lora(captured("two_sites"))])
    steps: list[Pass] = [MergeLora(), FreezeIntegers(), RotateWeights(), SplitDigits(), PackInt4()]
    args = program.example_inputs(3)
    wanted = program.module()(*args)
    for step in steps:
        program = run_pass(program, step, check_numerics=True)
        assert not site_problems(program), step
    close(program.module()(*args), wanted, 1e-4)
    assert program.styles
    with pytest.raises(PassError, match="takes a program that is captured or quantised or trained"):
        attach_loras(program, ["b=x.safetensors"])


def test_two_of_them_and_names_that_are_taken(captured: Captured, lora: Callable[..., str]) -> None:
    program = captured("two_sites")
    files = [lora(program, name, seed) for name, seed in (("a", 3), ("b", 4))]
    attached = attach_loras(program, files)
    assert [spec.name for spec in attached.inputs[-2:]] == ["lora_scale_a", "lora_scale_b"]
    args = program.example_inputs(1)
    wanted = merged_by_hand(merged_by_hand(program, layers_of(program), 0.5), layers_of(program, seed=4), -1.0)
    close(attached.module()(*args, torch.tensor([0.5]), torch.tensor([-1.0])), wanted.module()(*args))
    with pytest.raises(PassError, match="has an input lora_scale_a already"):
        attach_loras(attached, files[:1])
    with pytest.raises(PassError, match="a LoRA is attached to the program already"):
        merge_loras(attached, files[:1])


@pytest.mark.parametrize(("split", "model"), [(SplitConcat(), "joined"), (SplitSigns(), "cross_attention")])
def test_parts_of_split_layers_have_their_channels(captured: Captured, tmp_path: Path, split: Pass, model: str) -> None:
    program = captured(model)
    parts = run_pass(program, split)
    assert any(site.endswith(":1") for site, _ in parts.sites())
    layers = {name: layer for name, layer in layers_of(program).items() if name != "grouped"}
    file = str(save_lora(tmp_path / "a.safetensors", tensors(layers, "bare")))
    args = program.example_inputs(2)
    wanted = merged_by_hand(program, layers, 0.5).module()(*args)
    for found in (
        attach_loras(parts, [file]).module()(*args, torch.full((2,), 0.5)),
        merge_loras(parts, [f"{file}:0.5"]).module()(*args),
    ):
        close(found, wanted, 1e-4)


def test_layers_that_were_dropped_have_no_effect_and_are_said(captured: Captured, lora: Callable[..., str]) -> None:
    program = captured("single_key")
    dropped = run_pass(program, DropSingleKeyAttention())
    attached = attach_loras(dropped, [lora(program)])
    gone = dict(attached.history[-1].missed)
    assert gone.keys() == set(dropped.history[-1].removed) != set()
    assert set(gone.values()) == {"the program has dropped the layer, which had no effect"}
    args = program.example_inputs(2)
    close(
        attached.module()(*args, torch.ones(2)),
        merged_by_hand(program, layers_of(program), 1.0).module()(*args),
        1e-4,
    )


def test_it_is_kept_on_disk(captured: Captured, lora: Callable[..., str], tmp_path: Path) -> None:
    program = attach_loras(run_pipeline(captured("two_sites"), QUANTISED), [f"s={lora(captured('two_sites'))}:0.25"])
    save_program(program, tmp_path / "p.hqc")
    loaded = load_program(tmp_path / "p.hqc")
    assert loaded.styles == program.styles
    assert loaded.inputs == program.inputs
    assert loaded.inputs[-1].default == 0.25
    args = program.example_inputs(2)
    assert torch.equal(loaded.module()(*args), program.module()(*args))
    assert str(loaded.styles[0]) == "s (a.safetensors): input lora_scale_s, 0.25 unless given; rank 3 at 2 sites"


def test_a_program_that_does_not_hold_together_is_refused(captured: Captured, lora: Callable[..., str]) -> None:
    program = attach_loras(captured("two_sites"), [f"s={lora(captured('two_sites'))}"])
    assert site_problems(program) == []
    assert "attached that has no input" in site_problems(program.evolve(inputs=program.inputs[:-1]))[0]
    plain = program.evolve(styles=())
    assert "its LoRA's scale is none of the inputs" in site_problems(plain)[0]

    def changed(role: str, index: int, by: str) -> Program:
        graph = copy_graph(program.graph)
        node = next(one for one in graph.nodes if one.meta.get("role") == role)
        node.update_arg(index, next(one for one in graph.nodes if by in (one.name, one.meta.get("role"))))
        return program.evolve(graph=graph)

    assert "reads something else than it does" in site_problems(changed("style_down", 0, "sample"))[0]
    assert "is not two layers" in site_problems(changed("style", 1, "layer"))[0]


def test_recipes_and_tasks_want_the_program_from_before(captured: Captured, lora: Callable[..., str]) -> None:
    program = attach_loras(captured("two_sites"), [f"s={lora(captured('two_sites'))}"])
    with pytest.raises(TrainingError, match="has the LoRA s attached"):
        task_of(program, synthetic=True)
    with pytest.raises(PassError, match="takes a program without inputs of LoRAs; this one has s attached"):
        ptq(program, "rtn", "w4a4", task=task_of(captured("two_sites"), synthetic=True))


def test_merging_is_for_captured_programs(captured: Captured, lora: Callable[..., str]) -> None:
    file = lora(captured("two_sites"))
    with pytest.raises(PassError, match="takes a program that is captured"):
        merge_loras(run_pipeline(captured("two_sites"), QUANTISED), [file])
    assert run_pass(captured("two_sites"), MergeStyle(file)).stage == Stage.CAPTURED


def test_what_cannot_be_attached_is_refused(captured: Captured, lora: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="grouped is a convolution of groups, which no LoRA is for"):
        attach_loras(captured("joined"), [lora(captured("joined"))])
    program = captured("two_sites")
    graph = copy_graph(program.graph)
    layer = next(node for node in graph.nodes if node.meta.get("site") == "head")
    layer.meta["shape"] = (16, 5)
    layers = {"head": layers_of(program)["head"]}
    file = str(save_lora(tmp_path / "a.safetensors", tensors(layers, "bare")))
    with pytest.raises(PassError, match="attach_style at head: its output is not one for each sample"):
        run_pass(program.evolve(graph=graph), AttachStyle(file))
    with pytest.raises(ArtefactError, match="no such file"):
        run_pass(program, AttachStyle("none.safetensors"))
