"""Which files a pipeline consists of: its index, and of the folders that it names configurations, vocabularies and the
weights that are used. Whatever else lies in the folder (.git, logs, other variants, pickles) is no part of it."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hqc.configurations import CLASS_NAME, read_configuration
from hqc.errors import ArtefactError

__all__ = ["DENOISERS", "INDEX", "PART", "part_variant", "pipeline_files", "pipeline_variant", "read_index"]

INDEX = "model_index.json"
DENOISERS = ("unet", "transformer")
"""The parts whose place a Program takes."""
PART = re.compile(r"[A-Za-z]\w{0,63}")

_CONFIGURATIONS = (
    *("config.json", "generation_config.json", "scheduler_config.json", "preprocessor_config.json"),
    *("processor_config.json", "video_preprocessor_config.json", "audio_tokenizer_config.json"),
)
_VOCABULARIES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "dict.txt", "entity_vocab.json", "byte_maps.json"),
    *("spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "tokenizer.model", "spm.model"),
    *("spm_char.model", "source.spm", "target.spm", "chat_template.json", "chat_template.jinja"),
)
_STEMS = ("diffusion_pytorch_model", "model")
_WEIGHTS = re.compile(rf"(?P<stem>{'|'.join(_STEMS)})(?:\.(?P<variant>\w+))?\.safetensors")
_SHARDS = re.compile(rf"(?P<stem>{'|'.join(_STEMS)})\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")
_SHARD = re.compile(r"\w[\w.-]*\.safetensors")


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json, with a class.

    Raises:
        ArtefactError: if it cannot be read, or is no index.
    """
    index = read_configuration(folder / INDEX)
    name = index.get("_class_name")
    if not isinstance(name, str) or not CLASS_NAME.fullmatch(name):
        raise ArtefactError(str(folder / INDEX), f"names the class {str(name)[:40]!r}", "Check the folder.")
    return index


def pipeline_files(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """The files of a pipeline without its denoiser, by the names that they have in a copy.

    variant: of the weights, where a part has it. Else a part's plain ones are taken, or the only variant there is. In a
    copy they have plain names, so that it is loaded without naming a variant.

    Raises:
        ArtefactError: if the index, or the list of a part's weights, cannot be read.
    """
    files = {INDEX: folder / INDEX}
    for part in _parts(read_index(folder)):
        files |= {f"{part}/{name}": path for name, path in _part_files(folder / part, variant)}
    return files


def _parts(index: Mapping[str, Any]) -> list[str]:
    """The parts that have a folder of their own in a copy."""
    return [
        name
        for name, value in index.items()
        if isinstance(value, list) and any(value) and PART.fullmatch(name) and name not in DENOISERS
    ]


def _part_files(folder: Path, variant: str | None) -> Iterator[tuple[str, Path]]:
    for name in (*_CONFIGURATIONS, *_VOCABULARIES):
        if (folder / name).is_file():
            yield name, folder / name
    chosen = part_variant(folder, variant)
    for stem in _STEMS:
        ending = f".{chosen}" if chosen else ""
        single, shards = folder / f"{stem}{ending}.safetensors", folder / f"{stem}.safetensors.index{ending}.json"
        if single.is_file():
            yield f"{stem}.safetensors", single
        elif shards.is_file():
            yield f"{stem}.safetensors.index.json", shards
            yield from ((name, folder / name) for name in _shard_names(shards))


def _shard_names(path: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        if wrong := [name for name in names if not _SHARD.fullmatch(name)]:
            raise ValueError(f"it names {wrong[0][:40]!r}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        found = " ".join(str(error).split())[:120]
        raise ArtefactError(str(path), f"is no list of weights ({found})", "Check the folder.") from error
    return names


def part_variant(folder: Path, wanted: str | None = None) -> str | None:
    """The variant of a part's weights to read, None for plain ones: the wanted, else plain ones, else what there is."""
    if not folder.is_dir():
        return None
    matches = [_WEIGHTS.fullmatch(path.name) or _SHARDS.fullmatch(path.name) for path in sorted(folder.iterdir())]
    found = [match["variant"] for match in matches if match is not None]
    if wanted is not None and wanted in found:
        return wanted
    return None if not found or None in found else found[0]


def pipeline_variant(folder: Path, index: Mapping[str, Any]) -> str | None:
    """What to give diffusers as the variant, None where every part has plain weights, or none."""
    return next(filter(None, (part_variant(folder / part) for part in _parts(index))), None)
