"""An export proves itself: the file is valid ONNX, every site agrees with torch on equal inputs, the network does too.

site     codes equal except within 1e-4 of a step of a rounding boundary; given the codes, outputs agree to 1e-5
network  ‖exported - fake-quant‖ ≤ 0.1·‖fake-quant - float‖: rounding flips stay far below the quantisation error
products max_code·(|w_k| + |w_k+1|) ≤ 32 767 for all neighbours: x86's u8×s8 multiply-add cannot saturate
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from hqc.errors import ExportError
from hqc.export.functions import register_schemas
from hqc.export.lowering import OUTPUT, Listen, Tap
from hqc.export.ort_session import open_session
from hqc.export.reference import code_levels, site_output, verification_inputs, without_quantisers
from hqc.export.sites import QuantisedSite, quantised_sites
from hqc.program import Program, Stage

__all__ = ["SiteCheck", "Verification", "saturating_pairs", "verify_export"]

BOUNDARY = 1e-4
SITE_BOUND = 1e-5
NETWORK_BOUND = 0.1
FLOAT_BOUND = 1e-4
# Without any float model to measure the quantisation error against.
BARE_BOUND = 1e-2
_MULTIPLY_ADD_LIMIT = 2**15 - 1
_TAP_BYTES = 2**29

Array = NDArray[np.generic]


@dataclass(frozen=True)
class SiteCheck:
    """One site on equal inputs: codes that differ, codes in all, relative error of the output given the codes."""

    site: str
    flipped: int
    codes: int
    output_error: float


@dataclass(frozen=True)
class Verification:
    """What was measured. Errors are relative norms; `quantisation_error` is None where no float model is at hand."""

    sites: tuple[SiteCheck, ...]
    network_error: float
    quantisation_error: float | None
    bound: float

    @property
    def worst(self) -> SiteCheck | None:
        """The site with the largest output error."""
        return max(self.sites, key=lambda check: check.output_error, default=None)

    @property
    def flipped(self) -> int:
        """Codes that differ, over all sites."""
        return sum(check.flipped for check in self.sites)

    @property
    def codes(self) -> int:
        """Codes compared, over all sites."""
        return sum(check.codes for check in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return {
            "network_error": self.network_error,
            "quantisation_error": self.quantisation_error,
            "bound": self.bound,
            "flipped_codes": self.flipped,
            "codes": self.codes,
            "worst_site": None if self.worst is None else asdict(self.worst),
        }

    def __str__(self) -> str:
        lines = []
        if self.worst is not None:
            lines.append(
                f"sites    {len(self.sites)} compared; worst {self.worst.site} {self.worst.output_error:.1e} relative; "
                f"{self.flipped} of {self.codes} codes flipped at a rounding boundary"
            )
        versus = "" if self.quantisation_error is None else f"; quantisation error {self.quantisation_error:.1e}"
        lines.append(f"network  error {self.network_error:.1e}, bound {self.bound:.1e}{versus}")
        return "\n".join(lines)


def verify_export(
    model: Path, taps: Mapping[str, Tap], reference: Program, *, float_program: Program | None = None, batch: int = 4
) -> Verification:
    """Checks a written model against the torch program that it came from.

    reference: the fake-quant program where there is one, else the program as given. float_program: the captured
    program; without it the reference with its quantisers bypassed stands in.

    Raises:
        ExportError: naming everything that is out of bounds.
    """
    register_schemas()
    try:
        onnx.checker.check_model(str(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(str(model.name), f"is not valid ONNX ({error})", "Report a bug.") from error
    args = verification_inputs(reference, batch)
    feeds = {spec.name: arg.numpy() for spec, arg in zip(reference.inputs, args, strict=True)}
    output = torch.from_numpy(open_session(model, threads=torch.get_num_threads()).run([OUTPUT], feeds)[0])
    checks, problems = _check_sites(model, taps, reference, feeds)
    result = Verification(tuple(checks), *_check_network(output, args, reference, float_program))
    # `not <=` so that NaN counts as a failure.
    if not result.network_error <= result.bound:
        problems.append(f"the network's output differs by {result.network_error:.1e}; the bound is {result.bound:.1e}")
    if problems:
        raise ExportError("export verification", "; ".join(problems[:5]), "Nothing was written. Report a bug.")
    return result


@torch.no_grad()
def _check_network(
    output: Tensor, args: Sequence[Tensor], reference: Program, float_program: Program | None
) -> tuple[float, float | None, float]:
    """(error, quantisation error or None, bound), all relative to the norm of the reference's output."""
    wanted = reference.module()(*args)
    size = wanted.norm().clamp_min(1e-30)
    error = float((output - wanted).norm() / size)
    if reference.stage == Stage.CAPTURED:
        return error, None, FLOAT_BOUND
    plain = float_program or without_quantisers(reference)
    if plain is None:
        return error, None, BARE_BOUND
    quantisation = float((plain.module()(*args) - wanted).norm() / size)
    # Where nothing is lost by quantising (a plan without sites), the float bound applies.
    return error, quantisation, max(NETWORK_BOUND * quantisation, FLOAT_BOUND)


# ---- site by site --------------------------------------------------------------------------------------------------


def _check_sites(
    model: Path, taps: Mapping[str, Tap], reference: Program, feeds: Mapping[str, Array]
) -> tuple[list[SiteCheck], list[str]]:
    sites = {site.site: site for site in quantised_sites(reference) if site.site in taps}
    placeholders = {node.name: node for node in reference.graph.nodes if node.op == "placeholder"}
    known = {placeholders[name]: torch.from_numpy(array) for name, array in feeds.items()}
    checks, problems = [], [f"site {s} is not in the graph" for s in _missing(reference, taps)]
    for group in _groups(sites, taps, reference, len(next(iter(feeds.values())))):
        values = _run_with_taps(model, [taps[name] for name in group], feeds)
        for name in group:
            problems += _saturation(name, taps[name], values)
            check, found = _check_site(sites[name], taps[name], reference, known, values)
            checks.append(check)
            problems += found
    return checks, problems


def _missing(reference: Program, taps: Mapping[str, Tap]) -> list[str]:
    return [site.site for site in quantised_sites(reference) if site.site not in taps]


def _groups(
    sites: Mapping[str, QuantisedSite], taps: Mapping[str, Tap], reference: Program, batch: int
) -> list[list[str]]:
    """Sites that are watched in one run, so that a large model's activations are not all kept at once."""
    groups: list[list[str]] = []
    room = 0
    for name, site in sites.items():
        shapes = [node.meta["shape"] for node in (site.x, site.layer)]
        size = sum(4 * batch * int(np.prod([d for d in shape if isinstance(d, int)])) for shape in shapes)
        size += sum(
            reference.state[k].numel() for k in (f"{name}.weight_codes", f"{name}.weight") if k in reference.state
        )
        if room < size or not groups:
            groups.append([])
            room = _TAP_BYTES
        groups[-1].append(name)
        room -= size
    return groups


def _run_with_taps(model: Path, taps: Sequence[Tap], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Runs a copy of the model that also returns what the taps name."""
    names = {name for tap in taps for name in (tap.input.name, tap.codes.name, tap.output.name, *tap.weights)}
    proto = onnx.load(str(model), load_external_data=False)
    have = {value.name for value in (*proto.graph.output, *proto.graph.input)}
    types = {tap.codes.name: onnx.TensorProto.UINT8 if tap.zero_point else onnx.TensorProto.INT8 for tap in taps}
    types |= {name: onnx.TensorProto.INT8 for tap in taps for name in tap.weights}
    for name in sorted(names - have):
        kind = types.get(name, onnx.TensorProto.FLOAT)
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    copy = model.with_name("watched.onnx")
    try:
        onnx.save(proto, str(copy))
        del proto
        outputs = sorted(names - set(feeds))
        values = dict(
            zip(outputs, open_session(copy, threads=torch.get_num_threads()).run(outputs, feeds), strict=True)
        )
    finally:
        copy.unlink(missing_ok=True)
    return values | {name: array for name, array in feeds.items() if name in names}


def _check_site(
    site: QuantisedSite, tap: Tap, reference: Program, known: Mapping[Any, Tensor], values: Mapping[str, Array]
) -> tuple[SiteCheck, list[str]]:
    """Feeds torch the runtime's own site input, then its own codes."""
    known = {**known, site.x: _heard(tap.input, values)}
    codes = _heard(tap.codes, values).to(torch.int16) - tap.zero_point
    level = code_levels(reference, site, known)
    low, high = site.quantiser.args[2:4]
    differs = level.round().clamp(low, high) != codes  # type: ignore[arg-type]
    far = (level - level.floor() - 0.5).abs() > BOUNDARY
    problems = []
    if wrong := int((differs & far).sum()):
        problems.append(f"{site.site}: {wrong} of {codes.numel()} codes differ away from a rounding boundary")
    wanted = site_output(reference, site, codes, known)
    found = _heard(tap.output, values)
    error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if not error <= SITE_BOUND:
        problems.append(f"{site.site}: the output differs by {error:.1e} relative on equal codes")
    return SiteCheck(site.site, int(differs.sum()), codes.numel(), error), problems


def _heard(where: Listen, values: Mapping[str, Array]) -> Tensor:
    tensor = torch.from_numpy(values[where.name])
    return tensor if where.perm is None else tensor.permute(where.perm).contiguous()


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
