"""Before and after each pass as text, for a model of one convolution and one linear layer.

`pytest --update-golden` writes the files; read the diff before committing it.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from attention_models import attending
from lora_files import layers_of, save_lora, tensors
from torch import Tensor, nn
from torch.nn import functional

from hqc.capture import trace
from hqc.capture.sources import Source
from hqc.passes import (
    PASSES,
    AttachBranch,
    AttachLora,
    AttachStyle,
    DropSingleKeyAttention,
    FinetuneOnly,
    FloatAttention,
    FreezeIntegers,
    InsertAttentionQdq,
    InsertHadamard,
    InsertQdq,
    InsertSmoothing,
    MergeLora,
    MergeStyle,
    OpenAttention,
    PackInt4,
    RotateWeights,
    SelectLayers,
    SplitConcat,
    SplitDigits,
    SplitSigns,
)
from hqc.pipeline import Pass, run_pass, run_pipeline
from hqc.program import InputSpec, Origin, Program
from hqc.steps import step_name
from hqc.text import graph_text

GOLDEN = Path(__file__).parent / "golden"
CHAIN: tuple[Pass, ...] = (
    SelectLayers(bits="w4a4"),
    InsertHadamard(block=32),
    InsertQdq(timesteps=(0.0, 500.0)),
    AttachLora(rank=4),
    MergeLora(),
    FreezeIntegers(),
    RotateWeights(),
    SplitDigits(),
    PackInt4(),
)


def described(program: Program) -> str:
    """The graph and the plan: what passes may change besides tensors."""
    sites = [
        f"{p.site}: w{p.weight_bits}a{p.activation_bits} block={p.block} lora={p.lora_rank}"
        + (f" ({p.reason})" if p.reason else "")
        for p in program.plan.sites
    ]
    return f"# stage {program.stage}\n" + "".join(f"# {site}\n" for site in sites) + graph_text(program)


@pytest.mark.parametrize("index", range(len(CHAIN)), ids=[step_name(type(one)) for one in CHAIN])
def test_golden(index: int, captured: Callable[[str], Program], golden: Callable[[Path, str], None]) -> None:
    name = step_name(type(CHAIN[index]))
    before = run_pipeline(captured("two_sites"), CHAIN[:index])
    golden(GOLDEN / f"{name}.before.txt", described(before))
    golden(GOLDEN / f"{name}.after.txt", described(run_pass(before, CHAIN[index])))


def test_golden_single_key(captured: Callable[[str], Program], golden: Callable[[Path, str], None]) -> None:
    """`drop_single_key_attention`, for a model that has one."""
    before = captured("single_key")
    golden(GOLDEN / "drop_single_key_attention.before.txt", described(before))
    golden(GOLDEN / "drop_single_key_attention.after.txt", described(run_pass(before, DropSingleKeyAttention())))


ATTENTION: tuple[Pass, ...] = (
    OpenAttention(),
    SelectLayers(bits="w4a4"),
    InsertQdq(timesteps=(0.0, 500.0)),
    InsertAttentionQdq(softmax_bits=4, operands="asymmetric"),
    FloatAttention(),
)


@pytest.mark.parametrize("index", [0, 3, 4], ids=[step_name(type(ATTENTION[i])) for i in (0, 3, 4)])
def test_golden_attention(index: int, golden: Callable[[Path, str], None]) -> None:
    """Written out, quantised, and in float again."""
    before, name = run_pipeline(attending(), ATTENTION[:index]), step_name(type(ATTENTION[index]))
    golden(GOLDEN / f"{name}.before.txt", described(before))
    golden(GOLDEN / f"{name}.after.txt", described(run_pass(before, ATTENTION[index])))


def test_golden_split_concat(captured: Callable[[str], Program], golden: Callable[[Path, str], None]) -> None:
    """`split_concat`, for a model that has concatenations."""
    before = captured("joined")
    golden(GOLDEN / "split_concat.before.txt", described(before))
    golden(GOLDEN / "split_concat.after.txt", described(run_pass(before, SplitConcat())))


class _Signs(nn.Module):
    """A convolution right behind SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.behind = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.behind(functional.silu(self.first(sample) + timestep.view(-1, 1, 1, 1)))


def test_golden_split_signs(golden: Callable[[Path, str], None]) -> None:
    """`split_signs`, for a layer behind an activation."""
    inputs = (InputSpec("sample", ("N", 4, 8, 8)), InputSpec("timestep", ("N",)))
    before = trace(Source(_Signs(), inputs, Origin(source="signs")))
    golden(GOLDEN / "split_signs.before.txt", described(before))
    golden(GOLDEN / "split_signs.after.txt", described(run_pass(before, SplitSigns())))


def test_golden_smoothing(captured: Callable[[str], Program], golden: Callable[[Path, str], None]) -> None:
    """`insert_smoothing`, which not every recipe has."""
    before = run_pass(captured("two_sites"), SelectLayers(bits="w4a4"))
    golden(GOLDEN / "insert_smoothing.before.txt", described(before))
    golden(GOLDEN / "insert_smoothing.after.txt", described(run_pass(before, InsertSmoothing())))


def test_golden_finetune_only(captured: Callable[[str], Program], golden: Callable[[Path, str], None]) -> None:
    """`finetune_only`, which changes the plan alone."""
    before = run_pipeline(captured("two_sites"), [SelectLayers(bits="w4a4"), InsertQdq((0.0, 500.0))])
    after = run_pass(before, FinetuneOnly(("head",), share=1.0))
    for side, program in (("before", before), ("after", after)):
        learning = ", ".join(plan.site for plan in program.plan.quantised if plan.trained)
        golden(GOLDEN / f"finetune_only.{side}.txt", f"# may learn: {learning}\n{described(program)}")


def test_golden_branch(captured: Callable[[str], Program], golden: Callable[[Path, str], None]) -> None:
    """`attach_branch`, behind a smoothing."""
    before = run_pipeline(captured("two_sites"), [SelectLayers(bits="w4a4"), InsertSmoothing()])
    golden(GOLDEN / "attach_branch.before.txt", described(before))
    golden(GOLDEN / "attach_branch.after.txt", described(run_pass(before, AttachBranch(rank=2))))


def test_golden_styles(tmp_path: Path, captured: Callable[[str], Program], golden: Callable[[Path, str], None]) -> None:
    """`merge_style`, which changes weights alone, and `attach_style`, beside rotated and quantised layers."""
    before = captured("two_sites")
    file = str(save_lora(tmp_path / "a.safetensors", tensors(layers_of(before), "bare")))
    golden(GOLDEN / "merge_style.before.txt", described(before))
    golden(GOLDEN / "merge_style.after.txt", described(run_pass(before, MergeStyle(file))))
    before = run_pipeline(before, CHAIN[:3])
    golden(GOLDEN / "attach_style.before.txt", described(before))
    golden(GOLDEN / "attach_style.after.txt", described(run_pass(before, AttachStyle(file, name="pixel"))))


def test_golden_two_digits(captured: Callable[[str], Program], golden: Callable[[Path, str], None]) -> None:
    """`split_digits` again, at widths where both sites need a second digit."""
    chain = [SelectLayers(bits="w8a8"), InsertHadamard(), InsertQdq((0.0,)), FreezeIntegers(), RotateWeights()]
    before = run_pipeline(captured("two_sites"), chain)
    golden(GOLDEN / "split_digits_w8a8.before.txt", described(before))
    golden(GOLDEN / "split_digits_w8a8.after.txt", described(run_pass(before, SplitDigits())))


def test_no_golden_file_is_left_over() -> None:
    names = {f"{name}.{side}.txt" for name in (*PASSES, "split_digits_w8a8") for side in ("before", "after")}
    assert {path.name for path in GOLDEN.iterdir()} == names
