"""Requests and responses of the API, and the checks that turn a body into a job."""

import secrets
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from hqc.serving.errors import ApiError
from hqc.serving.limits import Limits
from hqc.serving.prompts import digits_in_prompt

__all__ = [
    "DIGITS",
    "ErrorBody",
    "ErrorResponse",
    "GenerationRequest",
    "GenerationResponse",
    "Health",
    "ImageDatum",
    "Job",
    "ModelCard",
    "ModelList",
    "Usage",
    "job_from_body",
]

MAX_SEED = 2**63 - 1
RANDOM_SEEDS = 2**53  # random seeds stay below this, so that every JSON reader keeps them exact
DEFAULT_STEPS = 20
DIGITS = 10  # classes of the bundled model
MAX_PARAM_CHARACTERS = 64  # of an unknown field's name, when it is sent back


class GenerationRequest(BaseModel):
    """The body of `POST /v1/images/generations`. Null is the same as absent; unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    prompt: str | None = Field(None, max_length=1000, description='Names one digit: "7", "a handwritten seven".')
    class_label: int | None = Field(None, ge=0, description="The class, for digits the digit; instead of a prompt.")
    n: int = Field(1, ge=1, description="Number of images.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Image i uses seed + i; random when absent.")
    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps.")
    guidance_scale: float = Field(1.5, ge=0, le=20, description="Classifier-free guidance; none up to 1.")
    eta: float = Field(0.0, ge=0, le=1, description="Noise of DDIM; 0 is deterministic.")
    response_format: str = Field("b64_json", description='Only "b64_json".')
    size: str = Field("auto", description='"auto" or the model\'s own size.')
    model: str | None = Field(None, max_length=256, description="Any name; the response tells which model it was.")
    user: str | None = Field(None, max_length=256, description="Accepted and not used.")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}


@dataclass(frozen=True)
class Job:
    """What the sampler is asked for: n images of one class, image i from seed `seeds[i]`.

    An unconditional model takes no notice of the class, which then is 0.
    """

    class_label: int
    seeds: tuple[int, ...]
    num_inference_steps: int
    guidance_scale: float
    eta: float


class ImageDatum(BaseModel):
    """One image: PNG in base64, what was drawn, and the seed that draws it again."""

    b64_json: str
    revised_prompt: str
    seed: int


class Usage(BaseModel):
    """Seconds spent sampling, without the wait in the queue."""

    seconds: float


class GenerationResponse(BaseModel):
    """The answer to a generation; `created` in Unix seconds."""

    created: int
    data: list[ImageDatum]
    model: str
    usage: Usage


class ErrorBody(BaseModel):
    """What was wrong; `param` is the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """Every refusal has this shape."""

    error: ErrorBody


class Health(BaseModel):
    """The server is up; `hqc` is its version."""

    status: str
    model: str
    runtime: str
    hqc: str


class ModelCard(BaseModel):
    """One model that is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "hqc"


class ModelList(BaseModel):
    """All models that are served."""

    object: str = "list"
    data: list[ModelCard]


def job_from_body(body: bytes, limits: Limits, size: tuple[int, int], classes: int = DIGITS) -> Job:
    """The job that a request's body asks for.

    Args:
        body: JSON.
        limits: bounds of `n` and of the steps.
        size: width and height of the model's images, px.
        classes: that the model has; 0 for an unconditional one. Prompts are read for the ten digits alone.

    Raises:
        ApiError: 400 for a body that is no JSON; 422 with every violation, `param` naming the first.
    """
    try:
        request = GenerationRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None
    violations = _violations(request, limits, size, classes)
    if violations:
        raise ApiError(
            422,
            "; ".join(f"{name}: {text}" for name, text in violations),
            param=violations[0][0],
            code="invalid_value",
        )
    label = request.class_label
    if label is None:
        label = _digit(request.prompt or "") if classes else 0
    assert label is not None  # _violations has seen to it
    steps = request.num_inference_steps
    seed = secrets.randbelow(RANDOM_SEEDS - request.n) if request.seed is None else request.seed
    return Job(
        class_label=label,
        seeds=tuple(range(seed, seed + request.n)),
        num_inference_steps=min(DEFAULT_STEPS, limits.max_steps) if steps is None else steps,
        guidance_scale=request.guidance_scale,
        eta=request.eta,
    )


def _violations(
    request: GenerationRequest, limits: Limits, size: tuple[int, int], classes: int
) -> list[tuple[str, str]]:
    """(field, what is wrong with it) for all that the types alone do not say."""
    native = f"{size[0]}x{size[1]}"
    last_seed = (request.seed or 0) + request.n - 1
    steps = request.num_inference_steps or 1
    checks = [
        (
            request.n > limits.max_images,
            "n",
            f"{request.n} images, this server draws at most {limits.max_images}",
        ),
        (
            steps > limits.max_steps,
            "num_inference_steps",
            f"{steps}, this server takes at most {limits.max_steps}",
        ),
        (last_seed > MAX_SEED, "seed", f"image {request.n - 1} would need seed {last_seed}, above 2**63-1"),
        (
            request.response_format != "b64_json",
            "response_format",
            'only "b64_json": this server keeps no files that a URL could point to',
        ),
        (request.size not in ("auto", native), "size", f'this model draws "{native}"; send that or "auto"'),
    ]
    return _label_violations(request, classes) + [(name, text) for wrong, name, text in checks if wrong]


def _label_violations(request: GenerationRequest, classes: int) -> list[tuple[str, str]]:
    label = request.class_label
    if not classes:
        return [("class_label", "this model is unconditional; leave it out")] if label is not None else []
    if request.prompt is None and label is None:
        prompt = "a prompt that names one digit, or " if classes == DIGITS else ""
        return [("prompt", f"missing; send {prompt}class_label 0 to {classes - 1}")]
    if request.prompt is not None and label is not None:
        return [("class_label", "sent together with prompt; send one of the two")]
    if label is not None and label >= classes:
        return [("class_label", f"{label}, this model has the classes 0 to {classes - 1}")]
    if label is None and classes != DIGITS:
        return [("prompt", f"this model knows no words; send class_label 0 to {classes - 1}")]
    if label is None and _digit(request.prompt or "") is None:
        return [("prompt", 'must name exactly one digit, as in "7" or "a handwritten seven"')]
    return []


def _digit(prompt: str) -> int | None:
    """The digit that a prompt names; None where it names none, several or a larger number."""
    numbers = digits_in_prompt(prompt)
    return numbers[0] if len(numbers) == 1 else None


def _refusal(error: ValidationError) -> ApiError:
    details = error.errors(include_url=False, include_context=False, include_input=False)
    if details[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {details[0]['msg']}", code="invalid_json")
    code = "unknown_field" if details[0]["type"] == "extra_forbidden" else "invalid_value"
    message = "; ".join(_sentence(detail) for detail in details[:8])
    return ApiError(422, message, param=_param(details[0]), code=code)


def _sentence(detail: ErrorDetails) -> str:
    name = _param(detail)
    if name is None:
        return "the body must be a JSON object"
    if detail["type"] == "extra_forbidden":
        known = ", ".join(GenerationRequest.model_fields)
        return f"{name}: unknown field; known are {known}"
    return f"{name}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _param(detail: ErrorDetails) -> str | None:
    return str(detail["loc"][0])[:MAX_PARAM_CHARACTERS] if detail["loc"] else None
