"""Merge a LoRA of a style from a file: W + scale · up·down becomes the weight.

    before   y = op(x, W) + b
    after    y = op(x, W') + b,  W' = W + scale · (alpha / r) · up·down

In float and before anything is quantised: codes cannot take a delta of their own size. What `attach_style` puts beside
a quantised weight stays apart instead, with a scale that every call may choose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hqc.errors import ArtefactError, PassError
from hqc.passes.rewriting import layer_inputs, rewrite
from hqc.pipeline import Findings
from hqc.program import Program, Stage
from hqc.styles.reading import LoraFile, read_lora
from hqc.styles.record import Style

__all__ = ["MergeStyle", "misses_of"]


@dataclass(frozen=True)
class MergeStyle:
    """Adds a file's LoRA to the weights of a captured program.

    file: of safetensors. name: what the program calls it; the file's own unless given.
    """

    file: str
    scale: float = 1.0
    name: str = ""

    takes: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "nothing"

    def find(self, program: Program) -> Findings:
        """The sites that the file changes; misses are what it holds besides."""
        lora = read_lora(self.file, program)
        return Findings(lora.sites(), misses_of(lora))

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Writes the sums as new weights."""
        if program.attached_styles:
            raise PassError("merge_style", "a LoRA is attached to the program already", "Merge before attaching.")
        lora, edit = read_lora(self.file, program), rewrite(program)
        changed = set()
        for layer in lora.layers:
            for site, factors in lora.factors(layer).items():
                name = str(layer_inputs(edit.layers[site])[1].target)
                if name in changed:  # a later call of the same layer
                    continue
                changed.add(name)
                weight = program.state[name]
                merged = weight + self.scale * factors.delta(weight.shape)
                if not bool(merged.isfinite().all()):
                    found = f"makes weights of {site} infinite at scale {self.scale:g}"
                    raise ArtefactError(self.file, found, "Give a smaller scale.")
                edit.state[name] = merged
        style = Style(
            name=self.name or Path(self.file).stem,
            file=Path(self.file).name,
            sha256=lora.sha256,
            scale=self.scale,
            rank=lora.rank,
            sites=len(matches),
            merged=True,
        )
        return edit.finish(styles=(*program.styles, style))


def misses_of(lora: LoraFile) -> tuple[tuple[str, str], ...]:
    """What a file holds that no site takes."""
    gone = tuple((site, "the program has dropped the layer, which had no effect") for site in lora.removed)
    if not lora.text_keys:
        return gone
    said = f"{lora.text_keys} tensors of {lora.path.name}; a program is the denoiser alone"
    return (*gone, ("text encoder", said))
