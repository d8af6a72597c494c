"""Requests and responses of the API, and the checks that turn a body into a job of the model that is served."""

import secrets
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from hqc.evaluation.needs import Needs
from hqc.serving.errors import ApiError
from hqc.serving.limits import Limits
from hqc.serving.prompts import digits_in_prompt

__all__ = [
    "ErrorBody",
    "ErrorResponse",
    "GenerationRequest",
    "GenerationResponse",
    "Health",
    "ImageDatum",
    "Job",
    "ModelCard",
    "ModelList",
    "Takes",
    "Usage",
    "job_from_body",
    "request_schema",
    "takes",
]

MAX_SEED = 2**63 - 1
RANDOM_SEEDS = 2**53  # random seeds stay below this, so that every JSON reader keeps them exact
DEFAULT_STEPS = 20
DEFAULT_GUIDANCE = 1.5
MAX_PROMPT_CHARACTERS = 1000
MAX_PARAM_CHARACTERS = 64  # of an unknown field's name, when it is sent back


class GenerationRequest(BaseModel):
    """The body of `POST /v1/images/generations`. Null is the same as absent; unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    prompt: str | None = Field(None, max_length=MAX_PROMPT_CHARACTERS, description="What to draw.")
    negative_prompt: str | None = Field(
        None, max_length=MAX_PROMPT_CHARACTERS, description="What guidance leads away from."
    )
    class_label: int | None = Field(None, ge=0, description="The class to draw.")
    n: int = Field(1, ge=1, description="Number of images.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Image i uses seed + i; random when absent.")
    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps.")
    guidance_scale: float | None = Field(None, ge=0, le=20, description="Classifier-free guidance; none up to 1.")
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
    """What the sampler is asked for: n images of one class or prompt, image i from seed `seeds[i]`.

    label: the class; 0 for the one prompt, and for a model that is asked for nothing. drawn: in words.
    """

    label: int
    prompts: tuple[str, ...]
    negative_prompt: str
    drawn: str
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


class Takes(BaseModel):
    """What a request may ask the model for.

    kind: `prompt`, `class_label`, or `nothing`. classes: 0 to one less. fields: of the request, that apply.
    size: of the images, width x height.
    """

    kind: str
    classes: int
    fields: list[str]
    size: str
    max_images: int
    max_steps: int


class Health(BaseModel):
    """The server is up; `hqc` is its version, `takes` what a request may ask for."""

    status: str
    model: str
    runtime: str
    hqc: str
    takes: Takes


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


_CONDITIONS = ("prompt", "negative_prompt", "class_label", "guidance_scale", "eta")


def _fields(needs: Needs) -> list[str]:
    """The fields that mean something for the model; a prompt is read for the digit that it names."""
    asked = {needs.kind, *needs.options} | ({"prompt"} if needs.digits else set())
    return [name for name in GenerationRequest.model_fields if name not in _CONDITIONS or name in asked]


def takes(needs: Needs, limits: Limits) -> Takes:
    """What `/health` says of the model."""
    return Takes(
        kind=needs.kind,
        classes=needs.classes,
        fields=_fields(needs),
        size=_native(needs),
        max_images=limits.max_images,
        max_steps=limits.max_steps,
    )


def request_schema(needs: Needs, limits: Limits) -> dict[str, Any]:
    """The JSON schema of a request to this model, for OpenAPI: the fields that apply, and which must be there."""
    schema = GenerationRequest.model_json_schema()
    known = _fields(needs)
    schema["properties"] = {name: schema["properties"][name] for name in known}
    bounds = {"n": limits.max_images, "num_inference_steps": limits.max_steps}
    for name, most in bounds.items():
        schema["properties"][name]["description"] += f" At most {most}."
    if "guidance_scale" in known:
        usual = needs.usual_guidance(DEFAULT_GUIDANCE)
        text = f"Classifier-free guidance, {usual:g} when absent; none up to 1."
        schema["properties"]["guidance_scale"]["description"] = text
    schema["properties"]["size"]["description"] = f'"auto" or "{_native(needs)}".'
    if needs.kind == "class_label":
        schema["properties"]["class_label"]["description"] = f"The class, 0 to {needs.classes - 1}."
    if needs.digits:
        schema["properties"]["prompt"]["description"] = 'Names one digit: "7", "a handwritten seven".'
    elif needs.kind != "nothing":
        schema["required"] = [needs.kind]
    return schema


def _native(needs: Needs) -> str:
    return f"{needs.size[0]}x{needs.size[1]}"


def job_from_body(body: bytes, limits: Limits, needs: Needs) -> Job:
    """The job that a request's body asks for.

    Args:
        body: JSON.
        limits: bounds of `n` and of the steps.
        needs: what the model takes. Prompts are read for the ten digits where the model is the bundled one.

    Raises:
        ApiError: 400 for a body that is no JSON; 422 with every violation, `param` naming the first.
    """
    try:
        request = GenerationRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error, _fields(needs)) from None
    violations = _violations(request, limits, needs)
    if violations:
        raise ApiError(
            422,
            "; ".join(f"{name}: {text}" for name, text in violations),
            param=violations[0][0],
            code="invalid_value",
        )
    label, prompts, drawn = _asked(request, needs)
    steps = request.num_inference_steps
    seed = secrets.randbelow(RANDOM_SEEDS - request.n) if request.seed is None else request.seed
    return Job(
        label=label,
        prompts=prompts,
        negative_prompt=request.negative_prompt or "",
        drawn=drawn,
        seeds=tuple(range(seed, seed + request.n)),
        num_inference_steps=min(DEFAULT_STEPS, limits.max_steps) if steps is None else steps,
        guidance_scale=_guidance(request, needs),
        eta=request.eta,
    )


def _guidance(request: GenerationRequest, needs: Needs) -> float:
    """Without a wish 1.5, the pipeline's own where it is an input of the model, or none where it cannot give any."""
    if request.guidance_scale is not None:
        return request.guidance_scale
    return needs.usual_guidance(DEFAULT_GUIDANCE)


def _asked(request: GenerationRequest, needs: Needs) -> tuple[int, tuple[str, ...], str]:
    """(label, prompts, in words) of a request that has been checked."""
    if needs.kind == "nothing":
        return 0, (), "a sample of an unconditional model: no prompt was used"
    if needs.kind == "prompt":
        assert request.prompt is not None
        return 0, (request.prompt,), request.prompt
    label = request.class_label if request.class_label is not None else _digit(request.prompt or "")
    assert label is not None
    return label, (), f"a handwritten {label}" if needs.digits else f"class {label}"


def _violations(request: GenerationRequest, limits: Limits, needs: Needs) -> list[tuple[str, str]]:
    """(field, what is wrong with it) for all that the types alone do not say."""
    last_seed = (request.seed or 0) + request.n - 1
    steps = request.num_inference_steps or 1
    guidance = request.guidance_scale or 0.0
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
        (
            request.size not in ("auto", _native(needs)),
            "size",
            f'this model draws "{_native(needs)}"; send that or "auto"',
        ),
        (guidance > 1 and not needs.guides, "guidance_scale", "this model takes no guidance; leave it out"),
        (request.eta > 0 and "eta" not in needs.options, "eta", "this model takes none; leave it out"),
        (
            bool(request.negative_prompt) and "negative_prompt" not in needs.options,
            "negative_prompt",
            "this model takes none; leave it out",
        ),
    ]
    return _asked_violations(request, needs) + [(name, text) for wrong, name, text in checks if wrong]


def _asked_violations(request: GenerationRequest, needs: Needs) -> list[tuple[str, str]]:
    label = request.class_label
    if needs.kind == "nothing":  # clients of the images API always send a prompt
        return [("class_label", "this model is unconditional; leave it out")] if label is not None else []
    if needs.kind == "prompt":
        return _prompt_violations(request)
    if request.prompt is None and label is None:
        prompt = "a prompt that names one digit, or " if needs.digits else ""
        return [("prompt" if needs.digits else "class_label", f"missing; send {prompt}{_classes(needs)}")]
    if request.prompt is not None and label is not None:
        return [("class_label", "sent together with prompt; send one of the two")]
    if label is not None and label >= needs.classes:
        return [("class_label", f"{label}, this model has the classes 0 to {needs.classes - 1}")]
    if label is None and not needs.digits:
        return [("prompt", f"this model knows no words; send {_classes(needs)}")]
    if label is None and _digit(request.prompt or "") is None:
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


def _digit(prompt: str) -> int | None:
    """The digit that a prompt names; None where it names none, several or a larger number."""
    numbers = digits_in_prompt(prompt)
    return numbers[0] if len(numbers) == 1 else None


def _refusal(error: ValidationError, known: list[str]) -> ApiError:
    details = error.errors(include_url=False, include_context=False, include_input=False)
    if details[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {details[0]['msg']}", code="invalid_json")
    code = "unknown_field" if details[0]["type"] == "extra_forbidden" else "invalid_value"
    message = "; ".join(_sentence(detail, known) for detail in details[:8])
    return ApiError(422, message, param=_param(details[0]), code=code)


def _sentence(detail: ErrorDetails, known: list[str]) -> str:
    name = _param(detail)
    if name is None:
        return "the body must be a JSON object"
    if detail["type"] == "extra_forbidden":
        return f"{name}: unknown field; known are {', '.join(known)}"
    return f"{name}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _param(detail: ErrorDetails) -> str | None:
    return str(detail["loc"][0])[:MAX_PARAM_CHARACTERS] if detail["loc"] else None
