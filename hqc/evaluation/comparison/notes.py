"""The lines under the table: how images were drawn, what was scaled, on which machine."""

from collections.abc import Sequence

import torch

from hqc.errors import HqcError
from hqc.evaluation.bench.machine import describe_machine, machine_line
from hqc.evaluation.comparison.budget import Budgets, Scaled
from hqc.evaluation.comparison.cells import RUNS
from hqc.evaluation.comparison.subject import FOLLOWED, Protocol

__all__ = ["notes_of"]


def notes_of(
    protocol: Protocol, seeds: int, drawn_from: str, budgets: Budgets, found: Sequence[tuple[str, Scaled | HqcError]]
) -> tuple[str, ...]:
    """All of them. drawn_from: what was calibrated and trained on. found: every recipe as its budget has it."""
    by = "FID to float" if protocol.scored else "PSNR"
    return (
        *_protocol_lines(protocol, seeds),
        f"Calibrated and trained on {drawn_from or 'noise'}. Gain and cosine by timestep: the first "
        f"{min(FOLLOWED, protocol.images)} images of a seed. Milliseconds: the median of {RUNS} calls.",
        *_budget_lines(budgets, found),
        f"Ranks are among rows of the same bits, by {by}; rows within one standard deviation share one.",
        f"Machine: {machine_line(describe_machine())}; threads: {torch.get_num_threads()}.",
    )


def _protocol_lines(protocol: Protocol, seeds: int) -> tuple[str, ...]:
    sampler, images = protocol.sampler, protocol.images
    drawn = f"{images} images, seeds " + ", ".join(f"{1000 * k}–{1000 * k + images - 1}" for k in range(seeds))
    lines = [
        f"Protocol: {protocol.scheduler}, {sampler['num_inference_steps']} steps, η {sampler['eta']:g}, guidance "
        f"{sampler['guidance_scale']:g}; {drawn}, the same for every recipe."
    ]
    if seeds > 1:
        lines.append(
            "Mean ± standard deviation over the seeds; seed k adds k to a recipe's seeds of calibration and training."
        )
    if not protocol.scored:
        lines.append(f"IS, FID and accuracy are left out: {protocol.why_unscored}.")
    return tuple(lines)


def _budget_lines(budgets: Budgets, found: Sequence[tuple[str, Scaled | HqcError]]) -> tuple[str, ...]:
    """An evaluation is the denoiser on one sample; backward counts two."""
    lines = ["Evaluations are of the denoiser on one sample, backward counts two."]
    if budgets.qat is not None:
        why = ", what hq-dm costs on this program" if budgets.is_default else ""
        lines.append(f"Budget of qat: {_thousands(budgets.qat)}{why}.")
    if budgets.ptq is not None:
        lines.append(f"Budget of ptq: {_thousands(budgets.ptq)}.")
    factors = dict.fromkeys(
        f"{name}: {one.factor:.2f} × its iterations"
        for name, one in found
        if isinstance(one, Scaled) and one.factor is not None
    )
    return (" ".join([*lines, f"{'; '.join(factors)}." if factors else "No recipe is scaled."]),)


def _thousands(number: float) -> str:
    return f"{number:,.0f}".replace(",", " ")
