"""What a pipeline is asked with, once it is known: nothing here needs torch."""

from dataclasses import dataclass
from typing import Any, Literal

from hqc.errors import EvaluationError

__all__ = ["Kind", "Needs"]

Kind = Literal["prompt", "class_label", "nothing"]

_IMAGES_AT_ONCE, _PIXELS_AT_ONCE = 40, 40 * 64 * 64
_DIT_NULL_CLASS = 1000


@dataclass(frozen=True)
class Needs:
    """What a pipeline is asked with.

    pipeline: its class. kind: what is asked for, one an image. classes: how many there are, 0 of another kind.
    options: those of guidance_scale, eta and negative_prompt that its call takes. size: width and height of its
    images, px. distilled: guidance is an input of the model. digits: its classes are the bundled model's ten digits.
    counts: its call takes the number of images too. own_guidance: its call's default; None if it has none.
    """

    pipeline: str
    kind: Kind
    classes: int
    options: frozenset[str]
    size: tuple[int, int]
    distilled: bool = False
    digits: bool = False
    counts: bool = False
    own_guidance: float | None = None

    @property
    def guides(self) -> bool:
        """Whether the pipeline can give this model guidance."""
        null_is_another = self.pipeline == "DiTPipeline" and self.classes != _DIT_NULL_CLASS
        return "guidance_scale" in self.options and not null_is_another

    @property
    def at_once(self) -> int:
        """Images that are drawn together unless another number is asked for: fewer of large ones."""
        width, height = self.size
        return max(1, min(_IMAGES_AT_ONCE, _PIXELS_AT_ONCE // (width * height)))

    def usual_guidance(self, default: float) -> float:
        """Guidance where none is asked for: the pipeline's own for prompts, and where it is an input of the model."""
        if not self.guides:
            return 1.0
        own = self.distilled or self.kind == "prompt"
        return self.own_guidance if own and self.own_guidance is not None else default

    def check_labels(self, labels: Any) -> None:
        """Refuses labels that are no classes of the model.

        Raises:
            EvaluationError: naming the first.
        """
        wrong = [label for label in labels if not 0 <= label < self.classes]
        if self.kind == "class_label" and wrong:
            raise EvaluationError(
                f"class {wrong[0]}", f"the model has the classes 0 to {self.classes - 1}", "Give one of them."
            )

    def check_guidance(self, guidance_scale: float) -> None:
        """Refuses guidance that the pipeline cannot give with this model.

        Raises:
            EvaluationError: saying why.
        """
        if guidance_scale > 1 and "guidance_scale" in self.options and not self.guides:
            raise EvaluationError(
                f"guidance {guidance_scale:g}",
                f"DiTPipeline's null class is {_DIT_NULL_CLASS}, and this model has {self.classes} classes",
                "Give --guidance-scale 1.",
            )
