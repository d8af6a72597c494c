"""Verification site by site: torch is fed the runtime's own site input, then the runtime's own codes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from hqc.export.lowering import Listen, Tap
from hqc.export.ort_session import open_session, run_session
from hqc.export.reference import code_levels, site_output
from hqc.export.sites import QuantisedSite, quantised_sites
from hqc.memory import return_free_memory
from hqc.program import Program

__all__ = ["Array", "SiteCheck", "WatchedModel", "check_sites", "heard", "saturating_pairs"]

BOUNDARY = 1e-4
SITE_BOUND = 1e-5
_MULTIPLY_ADD_LIMIT = 2**15 - 1
_TAP_BYTES = 2**29

Array = NDArray[Any]


@dataclass(frozen=True)
class SiteCheck:
    """One site on equal inputs: codes that differ, codes in all, relative error of the output given the codes."""

    site: str
    flipped: int
    codes: int
    output_error: float


class WatchedModel:
    """A copy of a model that also returns what the taps listen to; one session serves every run.

    Use as a context manager: the copy lies beside the model, where its external data is.
    """

    def __init__(self, model: Path, taps: Sequence[Tap], *, values: Iterable[str] = ()) -> None:
        """values: names of further float values to watch."""
        self._copy = model.with_name("watched.onnx")
        self._taps = taps
        proto = onnx.load(str(model), load_external_data=False)
        inputs = {value.name for value in proto.graph.input}
        known = inputs | {value.name for value in proto.graph.output}
        kinds = dict.fromkeys(values, onnx.TensorProto.FLOAT) | dict(self._kinds())
        for name, kind in sorted(kinds.items()):
            if name not in known:
                proto.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
        self._constants = frozenset(name for tap in taps for name in tap.weights)
        onnx.save(proto, str(self._copy))

    def _kinds(self) -> Mapping[str, int]:
        types = onnx.TensorProto
        kinds = {name: types.FLOAT for tap in self._taps for name in (tap.input.name, tap.output.name)}
        kinds |= {tap.codes.name: types.UINT8 if tap.zero_point else types.INT8 for tap in self._taps}
        return kinds | {name: types.INT8 for tap in self._taps for name in tap.weights}

    def __enter__(self) -> "WatchedModel":
        try:
            self._session = open_session(self._copy, threads=torch.get_num_threads())
        finally:
            self._copy.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        del self._session
        return_free_memory()

    def run(self, names: Iterable[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The named values, inputs among them."""
        outputs = sorted(set(names) - set(feeds))
        found = run_session(self._session, outputs, feeds, constants=self._constants)
        return dict(zip(outputs, found, strict=True)) | {n: array for n, array in feeds.items() if n in set(names)}


def check_sites(
    watched: WatchedModel, taps: Mapping[str, Tap], reference: Program, feeds: Mapping[str, Array]
) -> tuple[list[SiteCheck], list[str]]:
    """Every quantised site, and what is wrong with any of them."""
    sites = {site.site: site for site in quantised_sites(reference)}
    placeholders = {node.name: node for node in reference.graph.nodes if node.op == "placeholder"}
    known = {placeholders[name]: torch.from_numpy(array) for name, array in feeds.items()}
    checks, problems = [], [f"site {name} is not in the exported graph" for name in sites.keys() - taps.keys()]
    for group in _groups([s for name, s in sites.items() if name in taps], reference, len(next(iter(feeds.values())))):
        heard_at = [taps[site.site] for site in group]
        names = {n for tap in heard_at for n in (tap.input.name, tap.codes.name, tap.output.name, *tap.weights)}
        values = watched.run(names, feeds)
        for site in group:
            problems += _saturation(site.site, taps[site.site], values)
            check, found = _check_site(site, taps[site.site], reference, known, values)
            checks.append(check)
            problems += found
        del values
        return_free_memory()
    return checks, problems


def _groups(sites: Sequence[QuantisedSite], reference: Program, batch: int) -> list[list[QuantisedSite]]:
    """Sites that are watched in one run, so that a large model's activations are not all kept at once."""
    groups: list[list[QuantisedSite]] = []
    room = 0
    for site in sites:
        shapes = [node.meta["shape"] for node in (site.x, site.layer)]
        size = sum(4 * batch * int(np.prod([d for d in shape if isinstance(d, int)])) for shape in shapes)
        weights = (f"{site.site}.{kind}" for kind in ("weight", "weight_merged", "weight_codes"))
        size += sum(reference.state[name].numel() for name in weights if name in reference.state)
        if room < size or not groups:
            groups.append([])
            room = _TAP_BYTES
        groups[-1].append(site)
        room -= size
    return groups


def heard(where: Listen, values: Mapping[str, Array]) -> Tensor:
    """A watched value in torch's layout."""
    tensor = torch.from_numpy(values[where.name])
    return tensor if where.perm is None else tensor.permute(where.perm).contiguous()


def _check_site(
    site: QuantisedSite, tap: Tap, reference: Program, known: Mapping[Any, Tensor], values: Mapping[str, Array]
) -> tuple[SiteCheck, list[str]]:
    known = {**known, site.x: heard(tap.input, values)}
    codes = heard(tap.codes, values).to(torch.int16) - tap.zero_point
    level = code_levels(reference, site, known)
    low, high = site.quantiser.args[2:4]
    differs = level.round().clamp(low, high) != codes  # type: ignore[arg-type]
    far = (level - level.floor() - 0.5).abs() > BOUNDARY
    problems = []
    if wrong := int((differs & far).sum()):
        problems.append(f"{site.site}: {wrong} of {codes.numel()} codes differ away from a rounding boundary")
    wanted = site_output(reference, site, codes, known)
    error = float((heard(tap.output, values) - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if not error <= SITE_BOUND:
        problems.append(f"{site.site}: the output differs by {error:.1e} relative on equal codes")
    return SiteCheck(site.site, int(differs.sum()), codes.numel(), error), problems


def saturating_pairs(weight: Array, largest_code: int) -> int:
    """Neighbouring rows k, k+1 of an int8 weight [K, O] whose products could leave int16 when added."""
    size = np.abs(weight.astype(np.int32))
    return int((largest_code * (size[:-1] + size[1:]) > _MULTIPLY_ADD_LIMIT).sum())


def _saturation(site: str, tap: Tap, values: Mapping[str, Array]) -> list[str]:
    problems = []
    for name in tap.weights:
        if values[name].dtype != np.int8:
            problems.append(f"{site}: the weight of its product is {values[name].dtype}; expected int8")
        elif pairs := saturating_pairs(values[name], tap.largest_code):
            problems.append(f"{site}: {pairs} pairs of weights could saturate an 8-bit multiply-add")
    return problems
