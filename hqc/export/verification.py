"""An export proves itself: the file is valid ONNX, every site agrees with torch on equal inputs, the network does too.

    site      codes equal except within 1e-4 of a step of a rounding boundary; given the codes, outputs agree to 1e-5
    products  max_code·(|w_k| + |w_k+1|) ≤ 32 767 for all neighbours: x86's u8×s8 multiply-add cannot saturate
    network   torch is run with the runtime's codes at every site: each code within 1e-2 of a step of torch's own
              rounding, outputs equal to 1e-4
    network   free-running, ‖exported - fake-quant‖ ≤ 0.1·‖fake-quant - float‖ over the samples whose codes all agree

Rounding is not continuous: where a value lies on a boundary, float noise of 1e-7 moves it by a whole step, which
moves others further down, until two equally right paths have parted by up to the quantisation error itself. It happens
to torch's own integer form against torch's own fake-quant form: on `digits` to one sample in eight at w4a4, to half of
them at w8a8, whose grid is finer. So a sample with such a flip is judged by the run with its codes given, in which
nothing is left to chance; its free-running error is reported, and may be √2 of the quantisation error, two draws of the
same size. The codes come from a copy of the model that also returns them; a sample on which the file itself parts from
that copy counts as one with a flip.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from hqc.errors import ExportError
from hqc.export.functions import register_schemas
from hqc.export.lowering import OUTPUT, Tap
from hqc.export.ort_session import open_session, run_session
from hqc.export.reference import ForcedRun, verification_inputs, without_quantisers
from hqc.export.site_checks import SiteCheck, check_sites, check_weights
from hqc.export.watched import Array, WatchedModel, heard
from hqc.memory import return_free_memory
from hqc.program import Program, Stage
from hqc.running import run_module
from hqc.sites import watched_sites
from hqc.wording import first_words, listed

__all__ = [
    "LARGE_MODEL",
    "NetworkCheck",
    "Verification",
    "check_network",
    "check_onnx",
    "file_output",
    "network_problems",
    "verify_export",
]

LARGE_MODEL = 2**28
"""Bytes of weights beyond which verification spares memory: fewer samples, plugins' bodies as they are written."""
FORCED_BOUND = 1e-4
FORCED_BOUNDARY = 1e-2
SETTLED_BOUND = 0.1
FREE_BOUND = math.sqrt(2)
ROUNDINGS = 16
LEVEL_ROUNDINGS = 64
"""How many roundings to the type between the sites an output, and the level of a code, may be away: norms subtract."""


@dataclass(frozen=True)
class NetworkCheck:
    """The whole network; errors are norms relative to the reference's output.

    `forced_error` with the runtime's codes in torch, `flipped` codes on the way and the `distance` in steps of the
    worst from its boundary; `free_error` with torch's own codes, over all samples; `parted` of `samples` hold a flipped
    code, and `settled_error` is the free-running error over the others, None if there are none; `quantisation_error` of
    the reference against the float model, None where there is no float model.
    """

    forced_error: float
    flipped: int
    distance: float
    free_error: float
    samples: int
    parted: int
    settled_error: float | None
    quantisation_error: float | None


@dataclass(frozen=True)
class Verification:
    """What was measured."""

    sites: tuple[SiteCheck, ...]
    network: NetworkCheck

    @property
    def worst(self) -> SiteCheck | None:
        """The site with the largest output error."""
        return max(self.sites, key=lambda check: check.output_error, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return {
            "sites": len(self.sites),
            "worst_site": None if self.worst is None else asdict(self.worst),
            "flipped_codes": sum(check.flipped for check in self.sites),
            "codes": sum(check.codes for check in self.sites),
            "network": asdict(self.network),
        }

    def __str__(self) -> str:
        net, lines = self.network, []
        if self.worst is not None:
            flipped, codes = (sum(getattr(c, name) for c in self.sites) for name in ("flipped", "codes"))
            lines.append(
                f"sites    {len(self.sites)} on equal inputs: worst output {self.worst.output_error:.1e} "
                f"({self.worst.site}), {flipped} of {codes} codes flipped at a rounding boundary"
            )
            lines.append(
                f"network  with equal codes {net.forced_error:.1e}; {net.flipped} codes flipped, "
                f"at most {net.distance:.1e} of a step past their boundary"
            )
        versus = "" if net.quantisation_error is None else f"; the quantisation error is {net.quantisation_error:.1e}"
        lines.append(f"network  free-running {net.free_error:.1e}{versus}")
        settled = "" if net.settled_error is None else f", {net.settled_error:.1e} without them"
        lines.append(f"network  {net.parted} of {net.samples} samples hold a flipped code{settled}")
        return "\n".join(lines)


def verify_export(
    model: Path,
    taps: Mapping[str, Tap],
    reference: Program,
    *,
    float_program: Program | None = None,
    batch: int = 8,
    rounding: float = 0.0,
    optimised: bool = True,
    output: Tensor | None = None,
) -> Verification:
    """Checks a written model against the torch program that it came from.

    reference: the fake-quant program where there is one, else the program as given. float_program: the captured
    program; without it the reference with its quantisers bypassed stands in. rounding: the relative error of the type
    between the sites where that is not float32: sites are held to the same bounds, the network to some of them.
    optimised: False lets ONNX Runtime run the nodes as they are written; else it folds what depends on weights alone,
    and holds all of it at once. output: `file_output` of the model, where that is known.

    Raises:
        ExportError: naming everything that is out of bounds.
    """
    check_onnx(model)
    return_free_memory()
    args = verification_inputs(reference, batch)
    feeds = {spec.name: arg.numpy() for spec, arg in zip(reference.inputs, args, strict=True)}
    # The file itself first, then the copy that is watched: runtimes optimise what nobody watches.
    output = file_output(model, reference, batch, optimised=optimised) if output is None else output
    sites, problems, codes, seen = [], [], {}, output  # type: ignore[var-annotated]
    if taps:
        with WatchedModel(model, list(taps.values()), optimised=optimised) as watched:
            sites, problems = check_sites(watched, taps, reference, feeds)
            codes, seen = _all_codes(watched, taps, feeds)
        problems += check_weights(model, taps, reference)
    network = check_network(output, seen, codes, reference, float_program, args)
    problems += network_problems(network, reference, rounding)
    if problems:
        raise ExportError(
            "export verification", "; ".join(problems[:5]), "Nothing was written. Report a bug.", lists=True
        )
    return Verification(tuple(sites), network)


def check_onnx(model: Path) -> None:
    """Raises ExportError if a file is not valid ONNX."""
    register_schemas()
    try:
        onnx.checker.check_model(str(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(str(model.name), f"is not valid ONNX ({first_words(error)})", "Report a bug.") from error


def file_output(model: Path, reference: Program, batch: int, *, optimised: bool = True) -> Tensor:
    """What ONNX Runtime makes of the verification inputs."""
    args = verification_inputs(reference, batch)
    feeds = {spec.name: arg.numpy() for spec, arg in zip(reference.inputs, args, strict=True)}
    level = "all" if optimised else "disabled"
    session = open_session(model, threads=torch.get_num_threads(), optimisation=level)
    output = torch.from_numpy(run_session(session, [OUTPUT], feeds)[0])
    del session
    return_free_memory()
    return output


@torch.no_grad()
def check_network(
    output: Tensor,
    watched: Tensor,
    codes: Mapping[str, Tensor],
    reference: Program,
    float_program: Program | None,
    args: Sequence[Tensor],
) -> NetworkCheck:
    """Holds an output against the reference's. output: of the file; watched: of the copy that returned the codes."""
    forced_run = ForcedRun(reference, codes)
    forced = forced_run.run(*args)
    free = run_module(reference.module(), *args)
    _require_finite(free, reference)
    # A flip on the watched run, or one that parts the file's own run from it.
    parted = (output - watched).flatten(1).norm(dim=1) > FORCED_BOUND * watched.flatten(1).norm(dim=1)
    if len(forced_run.parted):
        parted |= forced_run.parted
    plain = None
    if reference.stage != Stage.CAPTURED:
        plain = float_program or without_quantisers(reference)
    return NetworkCheck(
        forced_error=_relative(watched, forced),
        flipped=sum(forced_run.flipped.values()),
        distance=max(forced_run.distance.values(), default=0.0),
        free_error=_relative(output, free),
        samples=len(output),
        parted=int(parted.sum()),
        settled_error=None if bool(parted.all()) else _relative(output[~parted], free[~parted]),
        quantisation_error=None if plain is None else _relative(run_module(plain.module(), *args), free),
    )


def _require_finite(free: Tensor, reference: Program) -> None:
    """Refuses to compare with NaN: the cause is in the program, not in its export."""
    if bool(free.isfinite().all()):
        return
    damaged = [name for name, tensor in reference.state.items() if tensor.is_floating_point() and tensor.isnan().any()]
    cause = f"its weights have NaN: {listed(damaged)}" if damaged else "its weights have no NaN, so it overflows"
    raise ExportError(
        "program", f"gives NaN or infinity for random inputs; {cause}", "Trace it again from a file that is whole."
    )


def _relative(found: Tensor, wanted: Tensor) -> float:
    """‖found - wanted‖/‖wanted‖; 1 where something was found and nothing wanted."""
    size = wanted.norm() if bool(wanted.norm() > 0) else found.norm().clamp_min(1e-30)
    return float((found - wanted).norm() / size)


def _all_codes(
    watched: WatchedModel, taps: Mapping[str, Tap], feeds: Mapping[str, Array]
) -> tuple[dict[str, Tensor], Tensor]:
    """The integer codes of every site, small while they wait, and the output of the same run."""
    values = watched.run({OUTPUT, *(tap.codes.name for tap in taps.values())}, feeds)
    output = torch.from_numpy(values.pop(OUTPUT))
    found: dict[tuple[Any, ...], Tensor] = {}  # sites that read one tensor share its codes
    codes = {}
    for site, tap in taps.items():
        key = (tap.codes, tap.zero_point)
        if key not in found:
            wide = heard(tap.codes, values).to(torch.int16) - tap.zero_point
            found[key] = wide if bool((wide > 127).any()) else wide.to(torch.int8)  # a softmax has codes up to 255
        codes[site] = found[key]
    return codes, output


def network_problems(check: NetworkCheck, reference: Program, rounding: float) -> list[str]:
    """What is out of bounds; rounding: see `verify_export`. `not <=` so that NaN counts as a failure."""
    problems, forced = [], max(FORCED_BOUND, ROUNDINGS * rounding)
    largest = max((site.bounds.largest for site in watched_sites(reference)), default=0)
    boundary = FORCED_BOUNDARY + LEVEL_ROUNDINGS * rounding * largest
    if not check.forced_error <= forced:
        problems.append(f"with equal codes the output differs by {check.forced_error:.1e}; at most {forced:.0e}")
    if not check.distance <= boundary:
        problems.append(f"a code is {check.distance:.1e} of a step past its rounding boundary; at most {boundary:.2g}")
    if check.quantisation_error is not None:
        for what, error, factor in (
            ("over samples without a flipped code", check.settled_error, SETTLED_BOUND),
            ("over all samples", check.free_error, FREE_BOUND),
        ):
            bound = max(factor * check.quantisation_error, forced)
            if error is not None and not error <= bound:
                problems.append(f"free-running {what} the output differs by {error:.1e}; the bound is {bound:.1e}")
    return problems
