"""What a short training is worth at every site, and how much of that a LoRA of lower rank keeps."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hqc.evaluation.sensitivity import SensitivityProbe
from hqc.search.measure import Measure
from hqc.site_rules import SiteRule

__all__ = ["left_of"]

_MOST = 0.95
"""Of a gain: a site is never predicted to lose nothing."""


def left_of(
    trained: Measure,
    bits: str,
    ranks: Mapping[str, Sequence[int]],
    before: Mapping[str, float],
    progress: Callable[[int, str], None],
) -> list[list[float]]:
    """By site and rank the share of the squared error that is left after a training at these bits everywhere.

    trained: measures by a recipe that trains. ranks: of every site, ascending; the training has the largest. before:
    the errors without training.
    """
    rules = tuple(SiteRule(site, lora_rank=own[-1]) for site, own in ranks.items())
    request = trained.request(bits, rules)
    key, journal = trained.key(request), trained.journal
    wanted = [(site, _named(site, rank)) for site, own in ranks.items() for rank in own]
    if any(journal.get(key, name) is None for site, of_rank in wanted for name in (site, of_rank)):
        made = trained.calibrated(request)
        for site, own in ranks.items():
            for rank in own:
                journal.add(
                    key, _share(made.state[f"{site}.lora_a"], made.state[f"{site}.lora_b"], rank), _named(site, rank)
                )
        probe = SensitivityProbe(trained.program, made, trained.inputs, ranks)
        for found in probe.measure(progress):
            journal.add(key, found.error, found.site)
    progress(len(ranks), bits)
    return [
        [_left(journal.get(key, site), before[site], journal.get(key, _named(site, rank))) for rank in own]
        for site, own in ranks.items()
    ]


def _named(site: str, rank: int) -> str:
    return f"{site} rank {rank}"


def _left(after: float | None, before: float, share: float | None) -> float:
    gain = 1 - ((after or 0.0) / max(before, 1e-30)) ** 2
    return 1 - min(max(gain, 0.0), _MOST) * (share or 0.0)


@torch.no_grad()
def _share(down: Tensor, up: Tensor, rank: int) -> float:
    """Σ of the largest `rank` squared singular values of B·A over that of all; 1 of what has learnt nothing.

    Of factors of taps: of the product of every tap.
    """
    small = torch.linalg.qr(up.double()).R @ torch.linalg.qr(down.double().mT).R.mT  # with the same singular values
    energy = torch.linalg.svdvals(small).square()
    whole = float(energy.sum())
    return float(energy[..., :rank].sum()) / whole if whole > 0 else 1.0
