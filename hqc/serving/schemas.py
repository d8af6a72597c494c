"""Answers of the API, in the shapes that the newest `openai` client reads."""

from typing import Any

from pydantic import BaseModel

__all__ = [
    "EVENT_SCHEMA",
    "ErrorBody",
    "ErrorResponse",
    "GenerationResponse",
    "Health",
    "ImageDatum",
    "Metrics",
    "ModelCard",
    "ModelList",
    "Takes",
    "TokenDetails",
    "Usage",
]


class ImageDatum(BaseModel):
    """One image: the file in base64, what was drawn, and the seed that draws it again."""

    b64_json: str
    revised_prompt: str
    seed: int


class TokenDetails(BaseModel):
    """Of what the tokens were."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """What clients of the images API count: nothing here, since no token is charged."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    output_tokens_details: TokenDetails = TokenDetails()
    total_tokens: int = 0


class Metrics(BaseModel):
    """Seconds that the request waited, and that its images were under way."""

    queue_seconds: float
    seconds: float


class GenerationResponse(BaseModel):
    """The answer to a generation; `created` in Unix seconds."""

    created: int
    data: list[ImageDatum]
    model: str
    background: str = "opaque"
    output_format: str
    quality: str = "auto"
    size: str
    usage: Usage = Usage()
    metrics: Metrics


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
    size: of the images, width x height. schedulers, loras: that may be named. previews: whether `partial_images` may be
    asked.
    """

    kind: str
    classes: int
    digits: bool
    fields: list[str]
    size: str
    schedulers: list[str]
    loras: list[str]
    previews: bool
    max_images: int
    max_steps: int
    num_inference_steps: int
    guidance_scale: float


class Health(BaseModel):
    """The server is up; `hqc` is its version, `takes` what a request may ask for. models: all, the first is `model`."""

    status: str
    model: str
    runtime: str
    hqc: str
    running: int
    waiting: int
    takes: Takes
    models: list[str]


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


_IMAGE = {name: {"type": "string"} for name in ("b64_json", "size", "quality", "background", "output_format")}
_IMAGE["created_at"] = {"type": "integer"}
_EVENTS: dict[str, dict[str, Any]] = {
    "image_generation.partial_image": {**_IMAGE, "partial_image_index": {"type": "integer", "minimum": 0}},
    "image_generation.completed": {
        **_IMAGE,
        "usage": {"$ref": "#/components/schemas/Usage"},
        "metrics": {"$ref": "#/components/schemas/Metrics"},
        "seed": {"type": "integer"},
    },
    "error": {"error": {"$ref": "#/components/schemas/ErrorBody"}},
}


def _data(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    properties = {"type": {"const": kind}, **fields}
    return {"type": "object", "properties": properties, "required": list(properties)}


EVENT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"type": "string", "enum": list(_EVENTS)},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"oneOf": [_data(kind, fields) for kind, fields in _EVENTS.items()]},
        },
    },
}
"""One server-sent event of a stream, as OpenAPI describes it; what `data` is once it is parsed in `contentSchema`."""
