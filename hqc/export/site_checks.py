"""Verification site by site: torch is fed the runtime's own site input, then the runtime's own codes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hqc.export.lowering import Tap
from hqc.export.reference import clipped, code_levels, joint_output, site_output
from hqc.export.watched import Array, WatchedModel, constants, heard
from hqc.memory import return_free_memory
from hqc.program import Program
from hqc.sites import QuantisedSite, watched_sites

__all__ = ["MULTIPLY_ADD_LIMIT", "SiteCheck", "check_sites", "check_weights", "saturating_pairs"]

BOUNDARY = 1e-4
SITE_BOUND = 1e-5
MULTIPLY_ADD_LIMIT = 2**15 - 1
"""Of the sum of two neighbouring u8×s8 products, which x86 without VNNI adds in int16."""
_TAP_BYTES = 2**29


@dataclass(frozen=True)
class SiteCheck:
    """One site on equal inputs: codes that differ, codes in all, relative error of the output given the codes."""

    site: str
    flipped: int
    codes: int
    output_error: float


def check_sites(
    watched: WatchedModel, taps: Mapping[str, Tap], reference: Program, feeds: Mapping[str, Array]
) -> tuple[list[SiteCheck], list[str]]:
    """Every quantised site, and what is wrong with any of them."""
    sites = {site.site: site for site in watched_sites(reference)}
    placeholders = {node.name: node for node in reference.graph.nodes if node.op == "placeholder"}
    known = {placeholders[name]: torch.from_numpy(array) for name, array in feeds.items()}
    checks, problems = [], [f"site {name} is not in the exported graph" for name in sites.keys() - taps.keys()]
    for group in _groups([s for name, s in sites.items() if name in taps], reference, len(next(iter(feeds.values())))):
        heard_at = [taps[site.site] for site in group]
        heard_at += [taps[site.partner] for site in group if taps[site.site].joint]
        names = {n for tap in heard_at for n in (tap.input.name, tap.codes.name, tap.output.name)}
        values = watched.run(names, feeds)
        for site in group:
            partner = sites[site.partner] if taps[site.site].joint else None
            check, found = _check_site(site, partner, taps, reference, known, values)
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
        shapes = [node.meta["shape"] for node in (site.x, site.product or site.layer)]
        size = sum(4 * batch * int(np.prod([d for d in shape if isinstance(d, int)])) for shape in shapes)
        if room < size or not groups:
            groups.append([])
            room = _TAP_BYTES
        groups[-1].append(site)
        room -= size
    return groups


def _codes(tap: Tap, values: Mapping[str, Array]) -> Tensor:
    return heard(tap.codes, values).to(torch.int16) - tap.zero_point


def _check_site(
    site: QuantisedSite,
    partner: QuantisedSite | None,
    taps: Mapping[str, Tap],
    reference: Program,
    known: Mapping[Any, Tensor],
    values: Mapping[str, Array],
) -> tuple[SiteCheck, list[str]]:
    """partner: what meets its codes in a product, where nothing else has their value."""
    tap = taps[site.site]
    known = {**known, site.x: heard(tap.input, values)}
    codes = _codes(tap, values)
    level = code_levels(reference, site, known)
    differs = clipped(reference, site, level.round(), known) != codes
    far = (level - level.floor() - 0.5).abs() > BOUNDARY
    problems = []
    if wrong := int((differs & far).sum()):
        problems.append(f"{site.site}: {wrong} of {codes.numel()} codes differ away from a rounding boundary")
    if partner is None:
        wanted = site_output(reference, site, codes, known)
    else:
        wanted = joint_output(reference, [(site, codes), (partner, _codes(taps[partner.site], values))], known)
    error = float((heard(tap.output, values) - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if not error <= SITE_BOUND + tap.rounding:
        problems.append(f"{site.site}: the output differs by {error:.1e} relative on equal codes")
    return SiteCheck(site.site, int(differs.sum()), codes.numel(), error), problems


def saturating_pairs(weight: Array, largest_code: int) -> int:
    """Neighbouring rows k, k+1 of an int8 weight [K, O] whose products could leave int16 when added."""
    size = np.abs(weight.astype(np.int32))
    return int((largest_code * (size[:-1] + size[1:]) > MULTIPLY_ADD_LIMIT).sum())


def check_weights(model: Path, taps: Mapping[str, Tap], reference: Program) -> list[str]:
    """What is wrong with the weights of products: not int8, or pairs that could saturate x86's multiply-add."""
    problems = []
    for group in _weight_groups(taps, reference):
        values = constants(model, [name for site in group for name in taps[site].weights])
        for site in group:
            problems += _saturation(site, taps[site], values)
        del values
        return_free_memory()
    return problems


def _weight_groups(taps: Mapping[str, Tap], reference: Program) -> Iterator[list[str]]:
    """Sites whose weights are looked at together, so that a large model's are not all in memory at once."""
    group: list[str] = []
    room = _TAP_BYTES
    for site in taps:
        kinds = (f"{site}.{kind}" for kind in ("weight", "weight_merged", "weight_codes"))
        size = sum(reference.state[name].numel() for name in kinds if name in reference.state)
        if group and room < size:
            yield group
            group, room = [], _TAP_BYTES
        group.append(site)
        room -= size
    yield group


def _saturation(site: str, tap: Tap, values: Mapping[str, Array]) -> list[str]:
    problems = []
    for name in tap.weights:
        if values[name].dtype != np.int8:
            problems.append(f"{site}: the weight of its product is {values[name].dtype}; expected int8")
        elif pairs := saturating_pairs(values[name], tap.largest_code):
            problems.append(f"{site}: {pairs} pairs of weights could saturate an 8-bit multiply-add")
    return problems
