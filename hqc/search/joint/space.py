"""What a joint plan may be: bits and a LoRA rank for every site, what that takes, and how it is predicted to err.

    cost = Σ_s bits of the site at its width + 16 bits · rank · (O + K)            K inputs, O outputs of its weight
    loss = Σ_s error_s(bits)² · (1 - gain_s · share_s(rank))                       gain, share: of one short training

The gain is what training took off the squared error of the site alone, the share what a LoRA of lower rank keeps of
what was learnt: the part of the squared singular values of B·A. LoRAs are merged before export; they count here, for
training holds them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["LORA_BITS", "Plan", "Space"]

LORA_BITS = 16

Plan = tuple[tuple[int, int], ...]
"""By site the numbers of its bits and of its rank; both ascend in cost."""


@dataclass(frozen=True)
class Space:
    """By site a row: costs and losses by candidate, ranks, their costs, and the share of the loss that is left.

    bits: the candidates. fixed, constant: what all else costs and loses. limit: of the cost.
    """

    sites: tuple[str, ...]
    bits: tuple[str, ...]
    costs: Sequence[Sequence[int]]
    losses: Sequence[Sequence[float]]
    ranks: Sequence[Sequence[int]]
    rank_costs: Sequence[Sequence[int]]
    left: Sequence[Sequence[float]]
    fixed: int
    constant: float
    limit: int

    def cost(self, plan: Plan) -> int:
        """In bits."""
        return self.fixed + sum(self._cost(site, *one) for site, one in enumerate(plan))

    def loss(self, plan: Plan) -> float:
        """The predicted squared error."""
        return self.constant + sum(self._loss(site, *one) for site, one in enumerate(plan))

    def _cost(self, site: int, bits: int, rank: int) -> int:
        return self.costs[site][bits] + self.rank_costs[site][rank]

    def _loss(self, site: int, bits: int, rank: int) -> float:
        return self.losses[site][bits] * self.left[site][rank]

    @property
    def smallest(self) -> Plan:
        """The cheapest plan."""
        return ((0, 0),) * len(self.sites)

    def repaired(self, plan: Plan) -> Plan:
        """The plan itself within the limit, else with steps down, each the one that adds least loss for what it saves.

        The smallest plan has to be within the limit.
        """
        changed, cost = list(plan), self.cost(plan)
        while cost > self.limit:
            steps = [(site, one) for site, here in enumerate(changed) for one in _lower(*here)]
            site, one = min(steps, key=lambda step: self._price(changed, *step))
            cost += self._cost(site, *one) - self._cost(site, *changed[site])
            changed[site] = one
        return tuple(changed)

    def _price(self, plan: Sequence[tuple[int, int]], site: int, one: tuple[int, int]) -> float:
        """Loss added for a bit saved; one that saves nothing comes last."""
        saved = self._cost(site, *plan[site]) - self._cost(site, *one)
        added = self._loss(site, *one) - self._loss(site, *plan[site])
        return added / saved if saved > 0 else float("inf")

    def neighbours(self, plan: Plan) -> Iterator[Plan]:
        """The plans that differ by one step up or down at one site, repaired."""
        for site, (bits, rank) in enumerate(plan):
            for one in (*_lower(bits, rank), (bits + 1, rank), (bits, rank + 1)):
                if one[0] < len(self.bits) and one[1] < len(self.ranks[site]):
                    yield self.repaired((*plan[:site], one, *plan[site + 1 :]))

    def numbers(self, plan: Plan) -> tuple[float, ...]:
        """The plan as a point in a unit cube."""
        points = zip(plan, self.ranks, strict=True)
        pairs = ((b / max(1, len(self.bits) - 1), r / max(1, len(ranks) - 1)) for (b, r), ranks in points)
        return tuple(number for pair in pairs for number in pair)

    def choices(self, plan: Plan) -> Mapping[str, tuple[str, int]]:
        """By site its bits and its rank."""
        return {s: (self.bits[b], self.ranks[i][r]) for i, (s, (b, r)) in enumerate(zip(self.sites, plan, strict=True))}


def _lower(bits: int, rank: int) -> Iterator[tuple[int, int]]:
    if bits:
        yield bits - 1, rank
    if rank:
        yield bits, rank - 1
