"""The torch side of a comparison: one site on its own, the whole network, and the network without quantisers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hqc.bounds import DEQUANTISERS, FAKE_QUANTISERS, QUANTISERS, clip_codes, scale_like
from hqc.ops.softmax_quantize import softmax_levels, softmax_values
from hqc.passes.rewriting import rewrite
from hqc.program import Program, is_op
from hqc.running import node_failure
from hqc.sites import QuantisedSite, watched_sites, with_residual

__all__ = [
    "ForcedRun",
    "clipped",
    "code_levels",
    "evaluate",
    "joint_output",
    "site_output",
    "verification_inputs",
    "without_quantisers",
]

ops = torch.ops.hqc
_SOFTMAX = ops.softmax_quantize.default
Values = Mapping[fx.Node, Tensor]


@torch.no_grad()
def evaluate(program: Program, node: fx.Node, known: Values) -> Tensor:
    """The value of a node, given those of others; runs only what lies between."""
    values: dict[fx.Node, Any] = dict(known)

    def visit(one: fx.Node) -> Any:
        if one not in values:
            if one.op == "get_attr":
                values[one] = program.state[str(one.target)]
            else:
                args = fx.map_arg(one.args, visit)
                values[one] = one.target(*args, **fx.map_arg(one.kwargs, visit))  # type: ignore[operator]
        return values[one]

    return visit(node)  # type: ignore[no-any-return]


def code_levels(program: Program, site: QuantisedSite, known: Values) -> Tensor:
    """x·(1/s) before rounding and clipping, from the site's input; -log₂ of a softmax that has powers of two."""
    rotated, scale, *rest = _arguments(program, site.quantiser, known)
    if is_op(site.quantiser, _SOFTMAX):
        return softmax_levels(rotated, scale, rest[0])
    return rotated * scale_like(site.quantiser, scale.reciprocal(), rotated)  # type: ignore[no-any-return]


def _arguments(program: Program, node: fx.Node, known: Values) -> list[Any]:
    return [evaluate(program, one, known) if isinstance(one, fx.Node) else one for one in node.args]


def _ends(quantiser: fx.Node, args: Sequence[Any]) -> tuple[Any, Any]:
    """The least and the largest code, of a quantiser's arguments."""
    return (0, 2 ** int(args[3]) - 1) if is_op(quantiser, _SOFTMAX) else tuple(args[2:4])  # type: ignore[return-value]


def clipped(program: Program, site: QuantisedSite, levels: Tensor, known: Values) -> Tensor:
    """Levels between the least and the largest code, each sample's own where they are looked up."""
    return clip_codes(levels, *_ends(site.quantiser, _arguments(program, site.quantiser, known)))


def site_output(program: Program, site: QuantisedSite, codes: Tensor, known: Values) -> Tensor:
    """The site's output from given codes: op(dequantised codes) + bias, as the program computes it."""
    return evaluate(program, with_residual(site.layer), {**known, **_given(program, site, codes, known)})


def joint_output(program: Program, given: Sequence[tuple[QuantisedSite, Tensor]], known: Values) -> Tensor:
    """The product of two sites within attention, from the codes of both."""
    values = {node: value for site, codes in given for node, value in _given(program, site, codes, known).items()}
    return evaluate(program, given[0][0].product, {**known, **values})  # type: ignore[arg-type]


def _given(program: Program, site: QuantisedSite, codes: Tensor, known: Values) -> dict[fx.Node, Tensor]:
    """What a site's codes make known: their real values, or themselves where the program has no others."""
    if site.real is None:
        return {site.quantiser: codes.to(torch.int8)}
    if is_op(site.quantiser, _SOFTMAX):
        _, scale, log2, _ = _arguments(program, site.quantiser, known)
        return {site.real: softmax_values(codes.to(scale.dtype), scale, log2)}
    scale = evaluate(program, site.quantiser.args[1], known)  # type: ignore[arg-type]
    return {site.real: codes.to(scale.dtype) * scale_like(site.quantiser, scale, codes)}


def verification_inputs(program: Program, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Fixed inputs whose samples have different timesteps: first, last and middle of the grid, and one beside it."""
    inputs = dict(zip((s.name for s in program.inputs), program.example_inputs(batch, seed), strict=True))
    grid = program.plan.timesteps
    if grid and "timestep" in inputs:
        middle = grid[len(grid) // 2]
        chosen = (grid[0], grid[-1], middle, 0.3 * grid[0] + 0.7 * middle)
        inputs["timestep"] = torch.tensor([chosen[i % len(chosen)] for i in range(batch)], dtype=torch.float32)
    return tuple(inputs.values())


def without_quantisers(program: Program) -> Program | None:
    """The program with its quantisers bypassed, a stand-in for the float model; None if its products are integer.

    A quantised program keeps its float weights (and its LoRA); a frozen one has only codes, so its weights stay
    quantised and only the activations become float. Weights of tables beside float activations keep no float form.
    """
    if any(plan.weight_only for plan in program.plan.sites) or any(
        is_op(node, ops.int_linear.default, ops.int_conv2d.default) for node in program.graph.nodes
    ):
        return None
    edit = rewrite(program)
    for node in list(edit.graph.nodes):
        if is_op(node, *FAKE_QUANTISERS, _SOFTMAX):
            node.replace_all_uses_with(node.args[0])
        elif is_op(node, *DEQUANTISERS) and is_op(node.args[0], *QUANTISERS):
            node.replace_all_uses_with(node.args[0].args[0])
    return edit.finish()


class ForcedRun(fx.Interpreter):
    """Runs a program with the codes of every site given, and notes how far they are from its own.

    `flipped[site]` counts codes that differ from the program's own rounding; `distance[site]` is how far, in steps,
    the worst of them is from the rounding boundary that it crossed; `parted` [N] marks the samples that hold one.
    """

    def __init__(self, program: Program, codes: Mapping[str, Tensor]) -> None:
        super().__init__(program.module())
        self.extra_traceback = False  # errors keep their own words
        self._sites = {site.quantiser.name: site for site in watched_sites(program) if site.site in codes}
        self._codes = codes
        self.flipped: dict[str, int] = {}
        self.distance: dict[str, float] = {}
        self.parted = torch.zeros(0, dtype=torch.bool)

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        """Quantisers return the given codes; everything else runs as usual."""
        site = self._sites.get(n.name)
        if site is None:
            try:
                return super().run_node(n)
            except Exception as error:
                raise node_failure(n, error) from error
        x, scale, *rest = given_args = self.fetch_args_kwargs_from_env(n)[0]
        softmax = is_op(n, _SOFTMAX)
        level = softmax_levels(x, scale, rest[0]) if softmax else x * scale_like(n, scale.reciprocal(), x)
        level = clip_codes(level, *_ends(n, given_args))
        codes = self._codes[site.site]
        differs = level.round() != codes
        self.flipped[site.site] = int(differs.sum())
        samples = differs.flatten(1).any(1)
        self.parted = self.parted | samples if len(self.parted) else samples
        # A code is right if the level lies within half a step of it.
        excess = (level - codes).abs() - 0.5
        self.distance[site.site] = float(excess[differs].max()) if self.flipped[site.site] else 0.0
        # With the strides of the quantiser's own result: layers choose their kernels by them, and kernels round apart.
        given = torch.empty_like(level, memory_format=torch.preserve_format).copy_(codes)
        if softmax:
            return softmax_values(given, scale, rest[0])
        return given * scale_like(n, scale, given) if is_op(n, *FAKE_QUANTISERS) else given.to(torch.int8)
