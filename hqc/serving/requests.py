"""The body of a request, and the checks that turn it into a job of the model that is served."""

import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from hqc.needs import Needs
from hqc.serving.backend import Drawing, See
from hqc.serving.errors import ApiError
from hqc.serving.limits import Limits
from hqc.serving.prompts import digits_in_prompt
from hqc.serving.schemas import Takes

__all__ = ["GenerationRequest", "Job", "Offer", "job_of", "request_from_body", "request_schema", "takes"]

MAX_SEED = 2**63 - 1
RANDOM_SEEDS = 2**53  # random seeds stay below this, so that every JSON reader keeps them exact
DEFAULT_STEPS = 20
DEFAULT_GUIDANCE = 1.5
MAX_PROMPT_CHARACTERS = 32_000
MAX_LORA_SCALE = 10.0
MAX_PARAM_CHARACTERS = 64  # of an unknown field's name, when it is sent back

Short = Annotated[str, Field(max_length=256)]
Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]


class GenerationRequest(BaseModel):
    """The body of `POST /v1/images/generations`. Null is the same as absent; unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    prompt: Prompt | None = Field(None, description="What to draw.")
    negative_prompt: Prompt | None = Field(None, description="What guidance leads away from.")
    class_label: int | None = Field(None, ge=0, description="The class to draw.")
    n: int | None = Field(None, ge=1, description="Number of images, 1 when absent.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Image i uses seed + i; random when absent.")
    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps.")
    guidance_scale: float | None = Field(None, ge=0, le=20, description="Classifier-free guidance; none up to 1.")
    eta: float | None = Field(None, ge=0, le=1, description="Noise of DDIM; 0, which is deterministic, when absent.")
    scheduler: Short | None = Field(None, description="Instead of the model's own.")
    loras: dict[Short, Annotated[float, Field(ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE)]] | None = Field(
        None, max_length=64, description="Scales of the model's LoRAs by name; others stay as they were attached."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events: previews, then the image. n = 1.")
    partial_images: int | None = Field(None, ge=0, le=3, description="Previews of a stream, 0 when absent.")
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="png when absent.")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of jpeg and webp in percent, 100 when absent."
    )
    response_format: Literal["b64_json"] | None = Field(None, description="Images are sent in the answer.")
    size: Short | None = Field(None, description='"auto" or the model\'s own size.')
    model: Short | None = Field(
        None, description="Of /v1/models; any other is the first. The answer says which it was."
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="Images are opaque.")
    quality: Literal["auto", "standard"] | None = Field(None, description="num_inference_steps decides it here.")
    style: Literal["vivid", "natural"] | None = Field(None, description="Accepted; the model has one style.")
    complexity: Literal["low", "medium", "high"] | None = Field(None, description="Accepted and not used.")
    moderation: Literal["low", "auto"] | None = Field(None, description="Accepted; nothing is moderated.")
    user: Short | None = Field(None, description="Accepted and not used.")
    safety_identifier: Short | None = Field(None, description="Accepted and not used.")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None or name not in cls.model_fields}


_INSTEAD = {
    "response_format": 'only "b64_json": this server keeps no files that a URL could point to',
    "quality": 'only "auto" or "standard": num_inference_steps decides it here',
    "background": 'only "auto" or "opaque": the model draws no transparency',
    "output_format": "only png, jpeg or webp",
    "frame_count": "only for animations, which this server does not make; leave it out",
    "frame_duration_ms": "only for animations, which this server does not make; leave it out",
    "svg": "this server draws no svg; leave it out",
}
"""What to say of values that OpenAI's own API takes."""


@dataclass(frozen=True)
class Offer:
    """What is served: what the model needs, what the server allows."""

    needs: Needs
    limits: Limits
    schedulers: tuple[str, ...] = ()
    previews: bool = False
    loras: tuple[str, ...] = ()

    @property
    def size(self) -> str:
        """Of the images, width x height."""
        return f"{self.needs.size[0]}x{self.needs.size[1]}"

    @property
    def steps(self) -> int:
        """Denoising steps where a request names none."""
        return min(DEFAULT_STEPS, self.limits.max_steps)

    @property
    def guidance(self) -> float:
        """Guidance where a request names none: the pipeline's own where it is an input of the model."""
        return self.needs.usual_guidance(DEFAULT_GUIDANCE)

    @property
    def fields(self) -> list[str]:
        """Those that mean something for the model; a prompt is read for the digit that it names."""
        asked = {self.needs.kind, *self.needs.options} | ({"prompt"} if self.needs.digits else set())
        asked |= {name for name, there in (("scheduler", self.schedulers), ("loras", self.loras)) if there}
        return [name for name in GenerationRequest.model_fields if name not in _CONDITIONS or name in asked]


_NEUTRAL: dict[str, dict[str, Any]] = {
    "prompt": {"type": ["string", "null"], "pattern": r"^\s*$"},
    "negative_prompt": {"enum": ["", None]},
    "class_label": {"type": "null"},
    "guidance_scale": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
    "eta": {"enum": [0, None]},
    "scheduler": {"type": "null"},
    "loras": {"type": ["object", "null"], "maxProperties": 0},
}
_CONDITIONS = tuple(_NEUTRAL)


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


def takes(offer: Offer) -> Takes:
    """What `/health` says of the model."""
    return Takes(
        kind=offer.needs.kind,
        classes=offer.needs.classes,
        digits=offer.needs.digits,
        fields=offer.fields,
        size=offer.size,
        schedulers=list(offer.schedulers),
        loras=list(offer.loras),
        previews=offer.previews,
        max_images=offer.limits.max_images,
        max_steps=offer.limits.max_steps,
        num_inference_steps=offer.steps,
        guidance_scale=offer.guidance,
    )


def request_schema(offer: Offer) -> dict[str, Any]:
    """The JSON schema of a request to this model, for OpenAPI: the fields that apply, and which must be there.

    Of fields that do not apply it has the values that change nothing.
    """
    needs, limits = offer.needs, offer.limits
    schema = GenerationRequest.model_json_schema()
    properties = {name: schema["properties"][name] for name in offer.fields}
    schema["properties"] = properties
    for name in _CONDITIONS:
        properties.setdefault(name, {"description": "Not of this model: leave it out.", **_NEUTRAL[name]})
    if needs.kind == "nothing":  # clients always send one
        properties["prompt"] |= {"type": ["string", "null"], "maxLength": MAX_PROMPT_CHARACTERS}
        properties["prompt"].pop("pattern")
    for name, most in {"n": limits.max_images, "num_inference_steps": limits.max_steps}.items():
        _value_of(properties[name])["maximum"] = most
    if not needs.guides and "guidance_scale" in offer.fields:
        _value_of(properties["guidance_scale"])["maximum"] = 1
    if not offer.previews:
        _value_of(properties["partial_images"])["maximum"] = 0
    _value_of(properties["size"])["enum"] = ["auto", offer.size]
    if "guidance_scale" in offer.fields:
        text = f"Classifier-free guidance, {offer.guidance:g} when absent; none up to 1."
        properties["guidance_scale"]["description"] = text
    if "loras" in offer.fields:
        _value_of(properties["loras"])["propertyNames"] = {"enum": list(offer.loras)}
    if "scheduler" in offer.fields:
        _value_of(properties["scheduler"])["enum"] = list(offer.schedulers)
    if needs.kind == "class_label":
        properties["class_label"]["description"] = f"The class, 0 to {needs.classes - 1}."
        _value_of(properties["class_label"])["maximum"] = needs.classes - 1
    if needs.digits:
        properties["prompt"]["description"] = 'Names one digit: "7", "a handwritten seven".'
    elif needs.kind != "nothing":
        schema["required"] = [needs.kind]
        properties[needs.kind] = {**_value_of(properties[needs.kind]), **_without_null(properties[needs.kind])}
    return schema


def _value_of(field: dict[str, Any]) -> dict[str, Any]:
    """What a field's schema says of a value that is not null."""
    alternatives: list[dict[str, Any]] = field["anyOf"]
    return alternatives[0]


def _without_null(field: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in field.items() if name not in ("anyOf", "default")}


def request_from_body(body: bytes) -> GenerationRequest:
    """A request as it was sent; what it means is known of a model alone.

    Raises:
        ApiError: 400 for a body that is no JSON, and for fields of another kind, `param` naming the first.
    """
    try:
        return GenerationRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None


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


def _refusal(error: ValidationError) -> ApiError:
    details = error.errors(include_url=False, include_context=False, include_input=False)
    if details[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {details[0]['msg']}", code="invalid_json")
    code = "unknown_parameter" if details[0]["type"] == "extra_forbidden" else "invalid_value"
    message = "; ".join(_sentence(detail) for detail in details[:8])
    return ApiError(400, message, param=_param(details[0]), code=code)


def _sentence(detail: ErrorDetails) -> str:
    name = _param(detail)
    if name is None:
        return "the body must be a JSON object"
    if name in _INSTEAD:
        return f"{name}: {_INSTEAD[name]}"
    if detail["type"] == "extra_forbidden":
        return f"{name}: unknown field; known are {', '.join(GenerationRequest.model_fields)}"
    return f"{name}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _param(detail: ErrorDetails) -> str | None:
    return str(detail["loc"][0])[:MAX_PARAM_CHARACTERS] if detail["loc"] else None
