"""The pipelines that run without torch: what each is asked with, which files it reads, and how its class samples."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hqc.errors import ArtefactError
from hqc.export.files import CONFIG_FILE, DATA_FILE, MODEL_FILE, SCHEDULER_FILE
from hqc.needs import Kind
from hqc.pipeline_parts import read_index

__all__ = ["FORMS", "Form", "form_of", "kind_of_pipeline", "require_listed"]

_ENCODER, _TOKENIZER = (MODEL_FILE,), ("tokenizer.json",)
_TEXT = {"text_encoder": _ENCODER, "tokenizer": _TOKENIZER}
_TEXT_2 = {"text_encoder_2": _ENCODER, "tokenizer_2": _TOKENIZER}


@dataclass(frozen=True)
class Form:
    """A class of diffusers' or of hqc's.

    parts: files that are read beside the denoiser, the decoder and the scheduler. unscaled: latents begin with normal
    numbers and are stepped from as the denoiser sees them, whatever the scheduler has them scaled by. own_guidance: the
    default of its call.
    """

    kind: Kind
    options: frozenset[str]
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unscaled: bool = False
    own_guidance: float = 1.0


_PROMPT = frozenset(("guidance_scale", "eta", "negative_prompt"))
FORMS: Mapping[str, Form] = {
    "ClassConditionalLDMPipeline": Form(
        "class_label", frozenset(("guidance_scale", "eta")), {"class_embedder": (MODEL_FILE, CONFIG_FILE)}
    ),
    "UnconditionalLDMPipeline": Form("nothing", frozenset(("eta",))),
    "DiTPipeline": Form("class_label", frozenset(("guidance_scale",)), unscaled=True, own_guidance=4.0),
    "StableDiffusionPipeline": Form("prompt", _PROMPT, _TEXT, own_guidance=7.5),
    "StableDiffusionXLPipeline": Form("prompt", _PROMPT, {**_TEXT, **_TEXT_2}, own_guidance=5.0),
}


def form_of(folder: Path) -> tuple[Form, str]:
    """Of an exported pipeline, and its class; no model is read.

    Raises:
        ArtefactError: if it is of a class that does not run without torch.
    """
    pipeline = str(read_index(folder)["_class_name"])
    if pipeline not in FORMS:
        raise ArtefactError(str(folder), f"holds a {pipeline}; this hqc runs {', '.join(FORMS)}", "Update hqc.")
    return FORMS[pipeline], pipeline


def kind_of_pipeline(folder: Path) -> tuple[Kind, str]:
    """What an exported pipeline is asked with, and its class.

    Raises:
        ArtefactError: see `form_of`.
    """
    form, pipeline = form_of(folder)
    return form.kind, pipeline


def require_listed(folder: Path, form: Form, listed: Mapping[str, object]) -> None:
    """Refuses a file that would be read and whose hash nobody has checked.

    Raises:
        ArtefactError: naming the first.
    """
    whole = (MODEL_FILE, CONFIG_FILE, "manifest.json")
    parts = {"unet": whole, "transformer": whole, "vae_decoder": whole, **form.parts}
    there = [name for name in parts if (folder / name).is_dir()]
    needed = [f"{part}/{name}" for part in (*form.parts, "vae_decoder", *there) for name in parts[part]]
    needed += [f"{part}/{DATA_FILE}" for part in there if (folder / part / DATA_FILE).exists()]
    if missing := [name for name in ("model_index.json", SCHEDULER_FILE, *needed) if name not in listed]:
        raise ArtefactError(str(folder), f"lists no {missing[0]}", "Export the pipeline again.")
