"""The body of `POST /v1/images/generations`, whatever model it is for."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from hqc.serving.errors import ApiError

__all__ = ["MAX_PROMPT_CHARACTERS", "MAX_SEED", "GenerationRequest", "request_from_body"]

MAX_SEED = 2**63 - 1
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


def request_from_body(body: bytes) -> GenerationRequest:
    """A request as it was sent; what it means is known of a model alone.

    Raises:
        ApiError: 400 for a body that is no JSON, and for fields of another kind, `param` naming the first.
    """
    try:
        return GenerationRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None


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
