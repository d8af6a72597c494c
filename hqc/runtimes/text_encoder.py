"""A pipeline folder's text encoders, tokenizers and scheduler, without its denoiser and its VAE."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

from hqc.errors import ArtefactError, TrainingError
from hqc.memory import require_memory, stored_parameters
from hqc.pipeline_parts import part_variant, read_index
from hqc.quiet import quiet_libraries
from hqc.runtimes.model import _pipeline_class
from hqc.runtimes.pipeline_files import check_pipeline

__all__ = ["load_text_pipeline"]

_LIBRARIES = {
    "text_encoder": "transformers",
    "bert": "latent_diffusion",  # diffusers' own, of the LDM pipeline
    "vqvae": "diffusers",  # which that pipeline cannot be made without
    "tokenizer": "transformers",
    "scheduler": "diffusers",
}


def load_text_pipeline(folder: Path) -> Any:
    """The diffusers pipeline of a folder with what encodes prompts and its scheduler; weights from safetensors alone.

    Raises:
        TrainingError: if it has no text encoder. ArtefactError: if the folder cannot be loaded, or asks for code of
        its own. MemoryShortError: if it does not fit the memory that is free.
    """
    index = read_index(folder)
    parts = {n: v for n, v in index.items() if isinstance(v, list) and len(v) == 2 and v != [None, None]}
    kept = {name: v for name, v in parts.items() if _role(name) in _LIBRARIES}
    encoders = [name for name in kept if name.startswith(("text_encoder", "bert"))]
    kind = _pipeline_class(folder, index)
    if not encoders or not (hasattr(kind, "encode_prompt") or "bert" in encoders):
        raise TrainingError(
            str(folder), f"the {kind.__name__} has no text encoder to encode prompts with", "Leave --prompts out."
        )
    for name, (library, class_name) in kept.items():
        _check_library(folder, name, library, class_name)
    check_pipeline(folder, kept)
    require_memory(f"loading the text encoders of {folder}", _bytes(folder, encoders))
    options: dict[str, Any] = {name: None for name in parts if name not in kept}
    if "requires_safety_checker" in inspect.signature(kind.__init__).parameters:
        options["requires_safety_checker"] = False
    with quiet_libraries():
        encoder = {name: _load_encoder(folder / name, kept[name][1]) for name in encoders}
        try:
            pipeline = kind.from_pretrained(folder, **encoder, **options, use_safetensors=True, local_files_only=True)
        except Exception as error:  # what tokenizers raise has no class of its own
            raise _broken(folder, error) from error
    pipeline.vae_scale_factor = _vae_scale_factor(folder, getattr(pipeline, "vae_scale_factor", 8))
    return pipeline


def _load_encoder(folder: Path, class_name: str) -> Any:
    """A text encoder in float32; what a file lacks is refused, where transformers would make it up and say so."""
    import transformers
    from diffusers.pipelines import latent_diffusion

    library = latent_diffusion if folder.name == "bert" else transformers
    try:
        encoder, found = getattr(library, class_name).from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            variant=part_variant(folder),
        )
    except Exception as error:  # whatever a file or a configuration makes transformers raise
        raise _broken(folder, error) from error
    if missing := sorted(found["missing_keys"]):
        first = ", ".join(missing[:3])
        raise ArtefactError(
            str(folder), f"lacks {len(missing)} of the text encoder's weights: {first}", "Fetch it again."
        )
    return encoder.float()  # a file in half precision is loaded as it is


def _broken(folder: Path, error: Exception) -> ArtefactError:
    first = " ".join(str(error).split())[:200] or type(error).__name__
    return ArtefactError(str(folder), f"its text encoder cannot be loaded ({first})", "Check the folder.")


def _role(part: str) -> str:
    """text_encoder of text_encoder_2."""
    return re.sub(r"_\d$", "", part)


def _check_library(folder: Path, part: str, library: str, class_name: str) -> None:
    """Refuses parts whose code does not come from the library: a folder can bring a module of its own."""
    wanted = _LIBRARIES[_role(part)]
    auto = library == "transformers" and str(class_name).startswith("Auto")  # a class that the folder may choose
    if library != wanted or not isinstance(class_name, str) or auto:
        raise ArtefactError(
            str(folder),
            f"its {part} is {library}.{class_name}; hqc runs those of {wanted} and no code from a folder",
            "Leave --prompts out, or give task=Task(…) from Python.",
        )


def _bytes(folder: Path, encoders: list[str]) -> int:
    return sum(4 * stored_parameters(folder / name, "model") for name in encoders)


def _vae_scale_factor(folder: Path, default: int) -> int:
    """Pixels of a latent's side, from the VAE's configuration; diffusers takes 8 without a VAE."""
    path = folder / "vae" / "config.json"
    if not path.is_file():
        return default
    try:
        return int(2 ** (len(json.loads(path.read_text(encoding="utf-8"))["block_out_channels"]) - 1))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(str(path), f"gives no block_out_channels ({error})", "Check the file.") from error
