"""What a denoiser is told: the tokens of a class, of a prompt, or nothing."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hqc.configurations import read_configuration
from hqc.errors import ArtefactError, RuntimeMissingError
from hqc.export.files import CLASS_LABELS, CONFIG_FILE, ENCODED, INPUT_IDS, LAST_HIDDEN_STATE
from hqc.export.interface import Interface
from hqc.lite.arrays import Floats
from hqc.lite.session import open_part
from hqc.wording import first_words

__all__ = ["Classes", "Condition", "Nothing", "Prompts"]

_KEPT = 64  # prompts whose tokens are kept: images of one request have the same


class Condition(Protocol):
    """Gives the condition [1, …] of one image, and the one that guidance leads away from."""

    def of(self, label: int, prompt: str | None) -> Floats | None:
        """What is asked for; None where nothing is."""
        ...

    def away(self, negative_prompt: str) -> Floats | None:
        """What guidance leads away from; None where there is no guidance."""
        ...

    def cuts(self, prompt: str) -> bool:
        """Whether a prompt is longer than what is read of it."""
        ...


class Nothing:
    """Of an unconditional pipeline."""

    def of(self, label: int, prompt: str | None) -> Floats | None:
        """Nothing."""
        return None

    def away(self, negative_prompt: str) -> Floats | None:
        """Nothing: there is no guidance."""
        return None

    def cuts(self, prompt: str) -> bool:
        """There is none."""
        return False


class Classes:
    """A token a class; the last row of the table stands for no class."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        """Raises ArtefactError if the embedder is damaged."""
        self._session = open_part(folder, threads, Interface({}, ENCODED))
        count = read_configuration(folder / CONFIG_FILE).get("num_classes")
        if not isinstance(count, int) or count < 1:
            raise ArtefactError(str(folder), "says no num_classes", "Export the pipeline again.")
        self.count = count

    def of(self, label: int, prompt: str | None) -> Floats | None:
        """The token of a class."""
        return self._session(**{CLASS_LABELS: np.array([label])})

    def away(self, negative_prompt: str) -> Floats | None:
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

    def of(self, label: int, prompt: str | None) -> Floats | None:
        """The vectors of a prompt."""
        return self._encoded(prompt or "")

    def away(self, negative_prompt: str) -> Floats | None:
        """Those of what guidance leads away from, or of no words."""
        return self._encoded(negative_prompt)

    def cuts(self, prompt: str) -> bool:
        """Whether it has more tokens than the text encoder takes."""
        return bool(self._tokens(prompt).overflowing)

    def _encode(self, text: str) -> Floats:
        return self._session(**{INPUT_IDS: np.array([self._tokens(text).ids])})


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
