"""What a server offers: what its model needs, what its limits allow, and both as a schema."""

from dataclasses import dataclass
from typing import Any

from hqc.needs import Needs
from hqc.serving.limits import Limits
from hqc.serving.requests import MAX_PROMPT_CHARACTERS, GenerationRequest
from hqc.serving.schemas import Takes

__all__ = ["Offer", "request_schema", "takes"]

DEFAULT_STEPS = 20
DEFAULT_GUIDANCE = 1.5


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
        """Guidance where a request names none: see `Needs.usual_guidance`."""
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
        if needs.kind == "prompt":
            properties["prompt"]["minLength"] = 1
    return schema


def _value_of(field: dict[str, Any]) -> dict[str, Any]:
    """What a field's schema says of a value that is not null."""
    alternatives: list[dict[str, Any]] = field["anyOf"]
    return alternatives[0]


def _without_null(field: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in field.items() if name not in ("anyOf", "default")}
