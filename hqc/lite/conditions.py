"""What a denoiser is told beside the sample and the time: of a class, of a prompt, or nothing."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hqc.configurations import read_configuration
from hqc.errors import ArtefactError, RuntimeMissingError
from hqc.export.files import (
    CLASS_LABELS,
    CONFIG_FILE,
    ENCODED,
    HIDDEN_STATES,
    INPUT_IDS,
    LAST_HIDDEN_STATE,
    TEXT_EMBEDS,
)
from hqc.export.interface import Interface
from hqc.lite.session import LiteSession, open_part
from hqc.pipeline_parts import read_index
from hqc.wording import first_words

__all__ = ["Classes", "Condition", "Given", "Labels", "Nothing", "Prompts", "TwoEncoders", "condition_of"]

_KEPT = 64  # prompts whose encodings are kept: images of one request have the same

Given = Mapping[str, NDArray[Any]]
"""Inputs [1, …] of the denoiser by hqc's names."""


class Condition(Protocol):
    """Gives what the denoiser is told of one image, and what guidance leads away from."""

    def of(self, label: int, prompt: str | None) -> Given:
        """What is asked for; nothing where nothing is."""
        ...

    def away(self, negative_prompt: str) -> Given:
        """What guidance leads away from, of the same inputs."""
        ...

    def cuts(self, prompt: str) -> bool:
        """Whether a prompt is longer than what is read of it."""
        ...


def condition_of(
    pipeline: str, folder: Path, denoiser: Path, size: tuple[int, int], threads: int | None
) -> tuple[Condition, int]:
    """What gives the condition of a pipeline of that class, and how many classes there are.

    size: width and height of its images, px.

    Raises:
        ArtefactError: if its files do not say it, or are damaged. RuntimeMissingError: without the library tokenizers.
    """
    if pipeline == "ClassConditionalLDMPipeline":
        found = Classes(folder / "class_embedder", threads)
        return found, found.count
    if pipeline == "DiTPipeline":
        count = _count(denoiser, "num_embeds_ada_norm")
        return Labels(count), count
    if pipeline == "StableDiffusionPipeline":
        return Prompts(folder / "tokenizer", folder / "text_encoder", threads), 0
    if pipeline == "StableDiffusionXLPipeline":
        return TwoEncoders(folder, size, threads), 0
    return Nothing(), 0


def _count(folder: Path, name: str) -> int:
    found = read_configuration(folder / CONFIG_FILE).get(name)
    if not isinstance(found, int) or found < 1:
        raise ArtefactError(str(folder), f"says no {name}", "Export the pipeline again.")
    return found


class Nothing:
    """Of an unconditional pipeline."""

    def of(self, label: int, prompt: str | None) -> Given:
        """Nothing."""
        return {}

    def away(self, negative_prompt: str) -> Given:
        """Nothing: there is no guidance."""
        return {}

    def cuts(self, prompt: str) -> bool:
        """There is none."""
        return False


class Labels:
    """The number of a class, which the denoiser takes itself; the one after the last stands for no class."""

    def __init__(self, count: int) -> None:
        self.count = count

    def of(self, label: int, prompt: str | None) -> Given:
        """The number of a class."""
        return {CLASS_LABELS: np.array([label])}

    def away(self, negative_prompt: str) -> Given:
        """That of no class."""
        return self.of(self.count, None)

    def cuts(self, prompt: str) -> bool:
        """There is none."""
        return False


class Classes:
    """A token a class; the last row of the table stands for no class."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        """Raises ArtefactError if the embedder is damaged."""
        self._session = open_part(folder, threads, Interface({}, ENCODED))
        self.count = _count(folder, "num_classes")

    def of(self, label: int, prompt: str | None) -> Given:
        """The token of a class."""
        return {"condition": self._session(**{CLASS_LABELS: np.array([label])})}

    def away(self, negative_prompt: str) -> Given:
        """The token of no class."""
        return self.of(self.count, None)

    def cuts(self, prompt: str) -> bool:
        """There is none."""
        return False


class Prompts:
    """A vector a token of the prompt, filled up to the text encoder's length."""

    def __init__(self, tokenizer: Path, encoder: Path, threads: int | None) -> None:
        """Raises ArtefactError if either is damaged, RuntimeMissingError if the library tokenizers is missing."""
        self._tokens = _tokenizer(tokenizer)
        self._session = open_part(encoder, threads, Interface({}, LAST_HIDDEN_STATE))
        self._encoded = lru_cache(_KEPT)(self._encode)

    def of(self, label: int, prompt: str | None) -> Given:
        """The vectors of a prompt."""
        return self._encoded(prompt or "")

    def away(self, negative_prompt: str) -> Given:
        """Those of what guidance leads away from, or of no words."""
        return self._encoded(negative_prompt)

    def cuts(self, prompt: str) -> bool:
        """Whether it has more tokens than the text encoder takes."""
        return bool(self._tokens(prompt).overflowing)

    def _encode(self, text: str) -> Given:
        return {"condition": self._session(**{INPUT_IDS: np.array([self._tokens(text).ids])})}


class TwoEncoders:
    """Of Stable Diffusion XL: the last but one hidden states of two encoders, the second's projection, and sizes."""

    def __init__(self, folder: Path, size: tuple[int, int], threads: int | None) -> None:
        """Raises ArtefactError if an encoder is damaged, RuntimeMissingError if the library tokenizers is missing."""
        self._tokens = [_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
        self._sessions = [
            open_part(folder / name, threads, Interface({}, LAST_HIDDEN_STATE))
            for name in ("text_encoder", "text_encoder_2")
        ]
        self._hidden = [_hidden(session, folder) for session in self._sessions]
        self._zeros = bool(read_index(folder).get("force_zeros_for_empty_prompt", True))
        width, height = size
        self._sizes = np.array([[height, width, 0, 0, height, width]], np.float32)  # uncropped
        self._encoded = lru_cache(_KEPT)(self._encode)

    def of(self, label: int, prompt: str | None) -> Given:
        """The vectors of a prompt."""
        return self._encoded(prompt or "")

    def away(self, negative_prompt: str) -> Given:
        """Those of what guidance leads away from; of no words zeros, unless the pipeline says otherwise."""
        found = self._encoded(negative_prompt)
        if negative_prompt or not self._zeros:
            return found
        return {name: value if name == "time_ids" else np.zeros_like(value) for name, value in found.items()}

    def cuts(self, prompt: str) -> bool:
        """Whether it has more tokens than an encoder takes."""
        return any(bool(tokens(prompt).overflowing) for tokens in self._tokens)

    def _encode(self, text: str) -> Given:
        first, second = ({INPUT_IDS: np.array([tokens(text).ids])} for tokens in self._tokens)
        (hidden,) = self._sessions[0].several([self._hidden[0]], **first)
        other, pooled = self._sessions[1].several([self._hidden[1], TEXT_EMBEDS], **second)
        return {
            "condition": np.concatenate([hidden, other], axis=-1),
            TEXT_EMBEDS: pooled,
            "time_ids": self._sizes,
        }


def _hidden(session: LiteSession, folder: Path) -> str:
    """The output that holds a text encoder's last but one hidden states."""
    name = next((name for name in session.outputs if name.startswith(HIDDEN_STATES)), None)
    if name is None:
        raise ArtefactError(str(folder), "has a text encoder without hidden states", "Export the pipeline again.")
    return name


def _tokenizer(folder: Path) -> Callable[[str], Any]:
    """Text -> the library's encoding, cut and filled."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise RuntimeMissingError(
            "prompts", "the package tokenizers is not installed", "Run `pip install tokenizers`."
        ) from error
    path = folder / "tokenizer.json"
    try:
        found: Any = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no class of its own for it
        raise ArtefactError(
            str(path), f"is no tokenizer ({first_words(error)})", "Export the pipeline again."
        ) from error

    return lambda text: found.encode(text.encode("utf-8", "replace").decode("utf-8"))
