"""Attach a LoRA of a style from a file beside the sites, its scale an input of the program.

    before   y = op(x̂, Ŵ) + b                             x̂: behind smoothing, rotation and quantiser
    after    y = (op(x̂, Ŵ) + b) + up(s · down(x))         down [r, C·kh·kw], up [O, r] times alpha / r

x is what the layer read before any of those: the float activation, neither smoothed nor rotated nor quantised, so that
the branch is the file's LoRA whatever the recipe did to the product beside it. s [N] is the input `lora_scale_NAME`, a
number a sample: 0 leaves the program as it was, to the bit but for the sign of a zero. For a convolution `down` has the
layer's own kernel, stride, padding and dilation, `up` is 1×1. A second file is added behind the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import fx

from hqc.errors import PassError
from hqc.passes.merge_style import misses_of
from hqc.passes.rewriting import CONV, LINEAR, Rewriter, rewrite
from hqc.pipeline import Findings
from hqc.program import BATCH, InputSpec, Program, Stage, aten, is_op
from hqc.sites import end_of, source_of
from hqc.styles.reading import Factors, read_lora
from hqc.styles.record import Style, scale_input

__all__ = ["AttachStyle"]


@dataclass(frozen=True)
class AttachStyle:
    """Puts a file's LoRA beside the sites that it changes.

    file: of safetensors. scale: what the input is where a call gives none. name: the input is `lora_scale_NAME`.
    """

    file: str
    scale: float = 1.0
    name: str = "style"

    takes: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED, Stage.QUANTISED, Stage.TRAINED)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "nothing"

    def find(self, program: Program) -> Findings:
        """The sites that the file changes; misses are what it holds besides.

        Raises:
            PassError: if the program has an input of that name, or a site cannot have a scale for each sample.
        """
        name = scale_input(self.name)
        if any(spec.name == name for spec in program.inputs):
            raise PassError("attach_style", f"the program has an input {name} already", "Give another name: NAME=FILE.")
        lora = read_lora(self.file, program)
        changed = set(lora.sites())
        for site, layer in program.sites():
            if site in changed and (reason := _unfit(layer)):
                raise PassError(f"attach_style at {site}", reason, "Merge the LoRA at `hqc trace --lora` instead.")
        return Findings(lora.sites(), misses_of(lora))

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Inserts the input, both layers, the scale and the sum."""
        lora, edit = read_lora(self.file, program), rewrite(program)
        spec = InputSpec(scale_input(self.name), (BATCH,), span=(0.0, 1.0), default=self.scale)
        scales = _Scales(edit, spec)
        for layer in lora.layers:
            for site, factors in lora.factors(layer).items():
                _attach(edit, site, self.name, factors, scales)
        style = Style(
            name=self.name,
            file=Path(self.file).name,
            sha256=lora.sha256,
            scale=self.scale,
            rank=lora.rank,
            sites=len(matches),
            merged=False,
        )
        return edit.finish(inputs=(*program.inputs, spec), styles=(*program.styles, style))


class _Scales:
    """The input [N], and it in the rank of each tensor that it multiplies."""

    def __init__(self, edit: Rewriter, spec: InputSpec) -> None:
        last = [node for node in edit.graph.nodes if node.op == "placeholder"][-1]
        with edit.graph.inserting_after(last):
            self._input = edit.graph.placeholder(spec.name)
        self._input.meta = {"shape": spec.shape, "dtype": spec.dtype}
        self._edit = edit
        self._of_rank: dict[int, fx.Node] = {}

    def of_rank(self, rank: int) -> fx.Node:
        """[N, 1, …]."""
        if rank not in self._of_rank:
            ones, first = [1] * (rank - 1), self._input.next
            meta: dict[str, Any] = {"shape": (BATCH, *ones), "dtype": "float32", "role": "style_scale"}
            self._of_rank[rank] = self._edit.call(first, aten.view.default, self._input, [-1, *ones], **meta)
        return self._of_rank[rank]


def _unfit(layer: fx.Node) -> str:
    """Why a site cannot have a branch with a scale for each sample, or nothing."""
    shape = layer.meta["shape"]
    return "" if shape and shape[0] == BATCH else "its output is not one for each sample"


def _attach(edit: Rewriter, site: str, name: str, factors: Factors, scales: _Scales) -> None:
    layer, end = edit.layers[site], end_of(edit.layers[site])
    x, after, readers = source_of(layer), end.next, list(end.users)
    image, outer, rank = is_op(layer, CONV), layer.meta["shape"], len(factors.down)
    factors_up = factors.up.view(*factors.up.shape, 1, 1) if image else factors.up
    down = edit.weight(f"{site}.style_{name}_down", factors.down, after)
    up = edit.weight(f"{site}.style_{name}_up", factors_up, after)
    inner = (outer[0], rank, *outer[2:]) if image else (*outer[:-1], rank)
    # No site of its own: layers that have one are named by it in exports.
    scope = {"scope": layer.meta["scope"]} if "scope" in layer.meta else {}
    narrow = {**scope, "shape": inner, "dtype": layer.meta["dtype"]}
    geometry = layer.args[3:6] if image else ()
    target = CONV if image else LINEAR
    first = edit.call(after, target, x, down, None, *geometry, role="style_down", **narrow)
    scaled = edit.call(after, aten.mul.Tensor, first, scales.of_rank(len(inner)), role="style_scaled", **narrow)
    second = edit.call(after, target, scaled, up, None, like=layer, role="style_up", **scope)
    total = edit.call(after, aten.add.Tensor, end, second, like=layer, site=site, role="style")
    for reader in readers:
        reader.replace_input_with(end, total)
