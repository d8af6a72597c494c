"""What a request asks of the model that is served: the checks that the types alone do not make."""

import secrets
from dataclasses import dataclass

from hqc.needs import Needs
from hqc.serving.backend import Drawing, See
from hqc.serving.errors import ApiError
from hqc.serving.offer import Offer
from hqc.serving.prompts import digits_in_prompt
from hqc.serving.requests import MAX_SEED, GenerationRequest

__all__ = ["Job", "job_of"]

RANDOM_SEEDS = 2**53  # random seeds stay below this, so that every JSON reader keeps them exact


@dataclass(frozen=True)
class Job:
    """What a request asks for: n images of one class or prompt, image i from seed `seeds[i]`.

    label: the class; 0 for a prompt, and for a model that is asked for nothing. drawn: in words.
    output_compression: None where it says nothing.
    """

    label: int
    prompt: str | None
    negative_prompt: str
    drawn: str
    seeds: tuple[int, ...]
    num_inference_steps: int
    guidance_scale: float
    eta: float = 0.0
    scheduler: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    stream: bool = False
    partial_images: int = 0
    output_format: str = "png"
    output_compression: int = 100

    def drawings(self, see: See | None = None) -> list[Drawing]:
        """One an image; `see` is given the previews."""
        return [
            Drawing(
                label=self.label,
                prompt=self.prompt,
                negative_prompt=self.negative_prompt,
                seed=seed,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                eta=self.eta,
                scheduler=self.scheduler,
                previews=0 if see is None else self.partial_images,
                see=see,
                loras=self.loras,
            )
            for seed in self.seeds
        ]


def job_of(request: GenerationRequest, offer: Offer) -> Job:
    """The job that a request asks a model for.

    Prompts are read for the ten digits where the model is the bundled one.

    Raises:
        ApiError: 400 with every violation, `param` naming the first.
    """
    if violations := _violations(request, offer):
        message = "; ".join(f"{name}: {text}" for name, text in violations)
        raise ApiError(400, message, param=violations[0][0], code="invalid_value")
    label, prompt, drawn = _asked(request, offer.needs)
    count = request.n or 1
    seed = secrets.randbelow(RANDOM_SEEDS - count) if request.seed is None else request.seed
    return Job(
        label=label,
        prompt=prompt,
        negative_prompt=request.negative_prompt or "",
        drawn=drawn,
        seeds=tuple(range(seed, seed + count)),
        num_inference_steps=request.num_inference_steps or offer.steps,
        guidance_scale=offer.guidance if request.guidance_scale is None else request.guidance_scale,
        eta=request.eta or 0.0,
        scheduler=request.scheduler,
        loras=tuple(sorted((request.loras or {}).items())),
        stream=bool(request.stream),
        partial_images=request.partial_images or 0,
        output_format=request.output_format or "png",
        output_compression=100 if request.output_compression is None else request.output_compression,
    )


def _asked(request: GenerationRequest, needs: Needs) -> tuple[int, str | None, str]:
    """(label, prompt, in words) of a request that has been checked."""
    if needs.kind == "nothing":
        return 0, None, "a sample of an unconditional model: no prompt was used"
    if needs.kind == "prompt":
        assert request.prompt is not None
        return 0, request.prompt, request.prompt
    label = request.class_label if request.class_label is not None else _digit(request.prompt)
    assert label is not None
    return label, None, f"a handwritten {label}" if needs.digits else f"class {label}"


def _violations(request: GenerationRequest, offer: Offer) -> list[tuple[str, str]]:
    """(field, what is wrong with it) for all that the types alone do not say."""
    needs, limits = offer.needs, offer.limits
    count, steps, guidance = request.n or 1, request.num_inference_steps or 1, request.guidance_scale or 0.0
    last_seed = (request.seed or 0) + count - 1
    checks = [
        (count > limits.max_images, "n", f"{count} images, this server draws at most {limits.max_images}"),
        (
            steps > limits.max_steps,
            "num_inference_steps",
            f"{steps}, this server takes at most {limits.max_steps}",
        ),
        (last_seed > MAX_SEED, "seed", f"image {count - 1} would need seed {last_seed}, above 2**63-1"),
        (
            request.size not in (None, "auto", offer.size),
            "size",
            f'this model draws "{offer.size}"; send that or "auto"',
        ),
        (guidance > 1 and not needs.guides, "guidance_scale", "this model takes no guidance; leave it out"),
        ((request.eta or 0) > 0 and "eta" not in needs.options, "eta", "this model takes none; leave it out"),
        (
            bool(request.negative_prompt) and "negative_prompt" not in needs.options,
            "negative_prompt",
            "this model takes none; leave it out",
        ),
        *_choice_checks(request, offer),
        *_output_checks(request, offer),
    ]
    return _asked_violations(request, needs) + [(name, text) for wrong, name, text in checks if wrong]


def _choice_checks(request: GenerationRequest, offer: Offer) -> list[tuple[bool, str, str]]:
    known = f"this model takes {', '.join(offer.schedulers)}" if offer.schedulers else "this model has its own alone"
    wrong = request.scheduler is not None and request.scheduler not in offer.schedulers
    styles = f"this model has {', '.join(offer.loras)}" if offer.loras else "this model has none"
    unknown = any(name not in offer.loras for name in request.loras or {})
    return [
        (wrong, "scheduler", f"{known}; send that, or leave it out"),
        (unknown, "loras", f"{styles}; name those, or leave it out"),
    ]


def _output_checks(request: GenerationRequest, offer: Offer) -> list[tuple[bool, str, str]]:
    partial, lossless = request.partial_images or 0, request.output_format in (None, "png")
    return [
        (
            bool(request.stream) and (request.n or 1) > 1,
            "n",
            "events do not say which image they belong to: a stream has one; send n requests",
        ),
        (partial > 0 and not request.stream, "partial_images", 'only of a stream; send "stream": true too'),
        (partial > 0 and not offer.previews, "partial_images", "the scheduler of this model tells none; send 0"),
        (
            lossless and request.output_compression not in (None, 100),
            "output_compression",
            'of jpeg and webp alone; send "output_format" too, or leave it out',
        ),
    ]


def _asked_violations(request: GenerationRequest, needs: Needs) -> list[tuple[str, str]]:
    label = request.class_label
    if needs.kind == "nothing":  # clients of the images API always send a prompt
        return [("class_label", "this model is unconditional; leave it out")] if label is not None else []
    if needs.kind == "prompt":
        return _prompt_violations(request)
    if request.prompt is None and label is None:
        prompt = "a prompt that names one digit, or " if needs.digits else ""
        return [("prompt" if needs.digits else "class_label", f"missing; send {prompt}{_classes(needs)}")]
    if label is not None and (request.prompt or "").strip() and not (needs.digits and _digit(request.prompt) == label):
        return [("class_label", "sent together with prompt; send one of the two, or an empty prompt")]
    if label is not None and label >= needs.classes:
        return [("class_label", f"{label}, this model has the classes 0 to {needs.classes - 1}")]
    if label is None and not needs.digits:
        return [("prompt", f"this model knows no words; send {_classes(needs)}")]
    if label is None and _digit(request.prompt) is None:
        return [("prompt", 'must name exactly one digit, as in "7" or "a handwritten seven"')]
    return []


def _prompt_violations(request: GenerationRequest) -> list[tuple[str, str]]:
    found = []
    if not (request.prompt or "").strip():
        found.append(("prompt", "missing; say what to draw"))
    if request.class_label is not None:
        found.append(("class_label", "this model takes a prompt; leave it out"))
    return found


def _classes(needs: Needs) -> str:
    return f"class_label 0 to {needs.classes - 1}"


def _digit(prompt: str | None) -> int | None:
    """The digit that a prompt names; None where it names none, several or a larger number."""
    numbers = digits_in_prompt(prompt or "")
    return numbers[0] if len(numbers) == 1 else None
