"""Reading a LoRA file for a program: keys and shapes are checked before any tensor is read, tensors as they are asked.

The product of a layer's LoRA is up·down times alpha / rank, which `up` has here. For a convolution `down` is one of the
layer's own kernel to `rank` channels and `up` a 1×1; LoCon's `mid` between two 1×1 is multiplied into `down`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hqc.errors import ArtefactError
from hqc.program import Program
from hqc.site_names import whole_site
from hqc.styles.alphas import Factor, factor_rule
from hqc.styles.keys import Part, is_of_text_encoder, layer_name, layer_of, layers_by_name, split_key
from hqc.wording import first_words, listed, printable, shortened

__all__ = ["Factors", "LoraFile", "check_file", "read_lora"]

_LARGEST_FILE = 8 * 2**30
_MOST_KEYS = 50_000
_TYPES = ("F64", "F32", "F16", "BF16")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MADE_FOR = "Give a LoRA that was made for this model."
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Factors:
    """A site's LoRA: down [r, C, …] in the shape of its weight, up [O, r] with alpha / rank in it."""

    down: Tensor
    up: Tensor

    def delta(self, shape: torch.Size) -> Tensor:
        """up·down in the shape of the weight."""
        return (self.up @ self.down.flatten(1)).reshape(shape)


@dataclass(frozen=True)
class LoraFile:
    """A file whose keys and shapes fit a program.

    layers: the keys of every layer's parts. removed: layers of it that passes have dropped from the program.
    text_keys: how many tensors are of text encoders.
    """

    path: Path
    sha256: str
    layers: Mapping[str, Mapping[Part, str]]
    removed: tuple[str, ...]
    text_keys: int
    factor: Factor
    shapes: Mapping[str, Shape]

    def sites(self) -> tuple[str, ...]:
        """The program's sites that it changes, in the graph's order."""
        changed = {site for layer in self.layers for site in self._sites_of[layer]}
        return tuple(site for site in self.shapes if site in changed)

    @cached_property
    def _sites_of(self) -> Mapping[str, Sequence[str]]:
        """The sites of every layer."""
        found: dict[str, list[str]] = {}
        for site in self.shapes:
            found.setdefault(layer_name(site), []).append(site)
        return found

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        with _opened(self.path) as file:
            return max(int(file.get_slice(keys["up"]).get_shape()[1]) for keys in self.layers.values())

    def factors(self, layer: str) -> dict[str, Factors]:
        """Of the sites that have a layer's weight: one, calls of it again, or the parts of a split layer.

        Raises:
            ArtefactError: for numbers that are not finite.
        """
        keys, sites = self.layers[layer], self._sites_of[layer]
        with _opened(self.path) as file:
            found = {part: self._tensor(file, key) for part, key in keys.items()}
        up, down = found["up"].flatten(1), found["down"]
        if "mid" in found:  # mid[r, s, …]·down[s, c]
            down = torch.einsum("rs...,sc->rc...", found["mid"], down.flatten(1))
        alpha = float(found["alpha"]) if "alpha" in found else None
        up = up * self.factor(layer, up.shape[1], alpha)
        if not bool(up.isfinite().all() and down.isfinite().all()):
            raise ArtefactError(str(self.path), f"overflows float32 at {layer}", "Give another file.")
        return _per_site(down, up, {site: self.shapes[site] for site in sites})

    def _tensor(self, file: Any, key: str) -> Tensor:
        tensor: Tensor = file.get_tensor(key).to(torch.float32)
        if not bool(tensor.isfinite().all()):
            found = f"has numbers that are NaN or infinite in {key}"
            raise ArtefactError(str(self.path), found, "The file is damaged: take another copy.")
        return tensor


def _per_site(down: Tensor, up: Tensor, shapes: Mapping[str, Shape]) -> dict[str, Factors]:
    """The same for every site, or for the parts of a split concatenation their channels of `down`."""
    starts: dict[str, int] = {}
    found = {}
    for site, (_, channels, *kernel) in shapes.items():
        part = down
        if down.shape[1] != channels:
            start = starts.get(whole_site(site), 0)
            part, starts[whole_site(site)] = down.narrow(1, start, channels), start + channels
        found[site] = Factors(part.reshape(up.shape[1], channels, *kernel).contiguous(), up)
    return found


def _weight_shapes(program: Program) -> dict[str, Shape]:
    """Of every site."""
    return {site: tuple(layer.args[1].meta["shape"]) for site, layer in program.sites()}  # type: ignore[union-attr]


def read_lora(path: str | Path, program: Program) -> LoraFile:
    """Opens a file and checks every key and every shape against the program's layers; no tensor is read yet.

    Raises:
        ArtefactError: if it is no safetensors file, holds keys that name no layer, or shapes that do not fit.
    """
    path = Path(path)
    check_file(path)
    with _opened(path) as file:
        keys = list(file.keys())
        metadata = dict(file.metadata() or {})
        slices = {key: file.get_slice(key) for key in keys} if len(keys) <= _MOST_KEYS else {}
        shapes: dict[str, Shape] = {key: tuple(one.get_shape()) for key, one in slices.items()}
        types = {key: str(one.get_dtype()) for key, one in slices.items()}
    if len(keys) > _MOST_KEYS:
        raise ArtefactError(str(path), f"holds {len(keys)} tensors; expected at most {_MOST_KEYS}", _MADE_FOR)
    if wrong := [key for key, kind in types.items() if kind not in _TYPES]:
        found = f"holds {_named(wrong)} as {types[wrong[0]]}; expected {', '.join(_TYPES)}"
        raise ArtefactError(str(path), found, "Save it in one of these.")
    text = [key for key in keys if is_of_text_encoder(key)]
    layers, removed = _layers(path, sorted(set(keys) - set(text)), program)
    if not layers:
        found = f"holds {len(text)} tensors of text encoders and" if text else "is empty: it holds"
        raise ArtefactError(str(path), f"{found} nothing that changes the denoiser", _MADE_FOR)
    weights = _weight_shapes(program)
    wholes = _by_whole_site(weights)
    grouped = {layer_name(site) for site, node in program.sites() if len(node.args) > 6 and node.args[6] != 1}
    problems = [f"{layer} is a convolution of groups, which no LoRA is for" for layer in layers if layer in grouped]
    problems += [said for layer, own in layers.items() if (said := _misfit(layer, own, shapes, wholes[layer]))]
    if problems:
        more = f" (and {len(problems) - 3} more layers)" if len(problems) > 3 else ""
        raise ArtefactError(str(path), f"{'; '.join(problems[:3])}{more}", _MADE_FOR, lists=True)
    return LoraFile(path, _checksum(path), layers, removed, len(text), factor_rule(path, metadata), weights)


def _by_whole_site(weights: Mapping[str, Shape]) -> dict[str, list[Shape]]:
    """The weights of a layer: of the parts of its first site, where that is split."""
    found: dict[str, dict[str, list[Shape]]] = {}
    for site, shape in weights.items():
        found.setdefault(layer_name(site), {}).setdefault(whole_site(site), []).append(shape)
    return {layer: next(iter(sites.values())) for layer, sites in found.items()}


def check_file(path: Path) -> None:
    """Refuses what is no file of a kind that hqc reads, or too large for a LoRA.

    Raises:
        ArtefactError: saying so.
    """
    if path.suffix in _PICKLED:
        do = "Convert it where you trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW)."
        raise ArtefactError(str(path), "may be a pickle, which can run code; hqc reads safetensors", do)
    if not path.is_file():
        what = "is a folder; expected a .safetensors file" if path.is_dir() else "no such file"
        raise ArtefactError(str(path), what, "Give the file itself.")
    if (size := path.stat().st_size) > _LARGEST_FILE:
        found = f"has {size / 2**30:.1f} GiB; a LoRA has at most {_LARGEST_FILE // 2**30}"
        raise ArtefactError(str(path), found, _MADE_FOR)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        found = f"is no safetensors file ({first_words(error, 100)})"
        raise ArtefactError(str(path), found, "Give a LoRA as .safetensors.") from error


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(names: list[str]) -> str:
    return listed([shortened(printable(name), 100) for name in names])


def _layers(path: Path, keys: list[str], program: Program) -> tuple[dict[str, dict[Part, str]], tuple[str, ...]]:
    """The keys of the program's layers by part, and the layers that passes have dropped.

    Raises:
        ArtefactError: for keys that name no layer, layers without both matrices, or a part that is there twice.
    """
    gone = [site for record in program.history for site in record.removed]
    by_name = layers_by_name([*(site for site, _ in program.sites()), *gone], program.origin.unet_config)
    found: dict[str, dict[Part, str]] = {}
    unknown, twice = [], []
    for key in keys:
        name, part = split_key(key) or (key, None)
        layer = layer_of(name, by_name) if part is not None else None
        if layer is None or part is None:
            unknown.append(key)
        elif part in found.setdefault(layer, {}):
            twice.append(key)
        else:
            found[layer][part] = key
    if unknown:
        what = f"holds {len(unknown)} of {len(keys)} tensors that are no LoRA of a layer here: {_named(unknown)}"
        raise ArtefactError(str(path), what, _MADE_FOR)
    if twice:
        raise ArtefactError(str(path), f"holds a part of one layer twice: {_named(twice)}", "Give another file.")
    if half := [layer for layer, own in found.items() if not {"down", "up"} <= own.keys()]:
        raise ArtefactError(str(path), f"holds one matrix of two, of {_named(half)}", "Give another file.")
    removed = tuple(sorted({layer_name(site) for site in gone} & found.keys()))
    return {layer: own for layer, own in found.items() if layer not in removed}, removed


def _misfit(layer: str, keys: Mapping[Part, str], shapes: Mapping[str, Shape], weights: list[Shape]) -> str:
    """What is wrong with a layer's shapes, or nothing. weights: its own, or those of its parts."""
    up, down = shapes[keys["up"]], shapes[keys["down"]]
    mid = shapes[keys["mid"]] if "mid" in keys else None
    outer, kernel = weights[0][0], weights[0][2:]
    # Parts of a split concatenation have some of the channels each, those of split signs all of them.
    inner = {sum(weight[1] for weight in weights), *(weight[1] for weight in weights)}
    rank = up[1] if len(up) > 1 else 0
    plain = (rank, *down[1:2])
    downs = {plain, (*plain, 1, 1)} if mid is not None or kernel in ((), (1, 1)) else {(*plain, *kernel)}
    fits = rank > 0 and up in ((outer, rank), (outer, rank, 1, 1)) and down in downs and down[1] in inner
    fits = fits and (mid is None or (mid == (rank, rank, *kernel) and kernel != ()))
    if not fits:
        given = " and ".join(str(list(shape)) for shape in (down, *([mid] if mid else []), up))
        return f"{layer} has the shapes {given}; its weight is {[outer, max(inner), *kernel]}"
    largest = min(outer, max(inner) * (kernel[0] * kernel[1] if kernel else 1))
    if rank > largest:
        return f"{layer} has rank {rank}; its weight {[outer, max(inner), *kernel]} has at most {largest}"
    alpha = shapes[keys["alpha"]] if "alpha" in keys else ()
    return "" if alpha in ((), (1,)) else f"{layer} has an alpha of {list(alpha)}; expected one number"
