"""Where two programs part: the error at every site, as it arrives there and as it is made there.

    arrives   both run freely on the same inputs; B's output of the site against A's
    made      the site alone, on equal inputs: what this site adds to the error

    relative  ‖b - a‖/‖a‖      cosine  a·b/(‖a‖·‖b‖)      SQNR, dB  -20·log₁₀(relative)

Both graphs run in step, so that only a site's worth of values is held at a time. A site that one program computes on
one row for all tokens (`drop_single_key_attention`) is compared as if it had computed every row.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, fx

from hqc.errors import ComparisonError
from hqc.evaluation.stepping import Run
from hqc.export.reference import evaluate
from hqc.program import Program
from hqc.sites import output_of, source_of

__all__ = [
    "Comparison",
    "ErrorNumbers",
    "LayerError",
    "Replay",
    "Watched",
    "check_inputs",
    "compare_programs",
    "error_numbers",
    "site_inputs",
    "watch",
]


@dataclass(frozen=True)
class ErrorNumbers:
    """b against a; None where a norm is zero. `sqnr_db` is None also where nothing differs."""

    relative: float | None
    cosine: float | None
    max_abs: float
    sqnr_db: float | None


@dataclass(frozen=True)
class LayerError:
    """One site; `arrives` or `made` is None where it could not be measured, and `note` says why."""

    site: str
    arrives: ErrorNumbers | None = None
    made: ErrorNumbers | None = None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """The sites of A in graph order, the network's output, sites that only one has, and what was not measured."""

    sites: tuple[LayerError, ...]
    output: ErrorNumbers
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    note: str = ""

    def worst_first(self, *, made: bool = False) -> list[LayerError]:
        """By the error that arrives, or that is made; sites without that number last, in graph order."""

        def size(error: LayerError) -> float:
            numbers = error.made if made else error.arrives
            return -math.inf if numbers is None or numbers.relative is None else numbers.relative

        return sorted(self.sites, key=size, reverse=True)


@dataclass(frozen=True)
class Watched:
    """A site that has just run: its input before any smoothing and rotation, and its output with any branch."""

    site: str
    x: Tensor
    y: Tensor


def error_numbers(a: Tensor, b: Tensor) -> ErrorNumbers:
    """b against a, in double precision."""
    wide_a, wide_b = a.double().reshape(-1), b.double().reshape(-1)
    size_a, size_b, error = float(wide_a.norm()), float(wide_b.norm()), wide_b - wide_a
    relative = float(error.norm()) / size_a if size_a > 0 else None
    cosine = float(wide_a @ wide_b) / (size_a * size_b) if size_a > 0 and size_b > 0 else None
    sqnr = -20 * math.log10(relative) if relative else None
    return ErrorNumbers(relative, cosine, float(error.abs().max()) if error.numel() else 0.0, sqnr)


def site_inputs(program: Program) -> dict[str, fx.Node]:
    """The node that every site reads: before smoothing, rotation and quantiser."""
    return {site: source_of(layer) for site, layer in program.sites()}


def watch(program: Program, args: Sequence[Tensor]) -> Iterator[Watched | Tensor]:
    """Runs a program; every site as it is computed, then the output."""
    run, sources = Run(program), {site: node.name for site, node in site_inputs(program).items()}
    outputs = {output_of(layer).name: site for site, layer in program.sites()}
    pending, held = Counter(sources.values()), dict[str, Tensor]()
    values = run.start(args)
    for _, node in run.steps(values):
        if node.name in pending:
            held[node.name] = values[node]
        if node.name not in outputs:
            continue
        site = outputs[node.name]
        source = sources[site]
        yield Watched(site, held[source], values[node])
        pending[source] -= 1
        if not pending[source]:
            del held[source]
    yield values[run.nodes[-1]]


def compare_programs(a: Program, b: Program, args: Sequence[Tensor]) -> Comparison:
    """B against A on the same inputs, site by site.

    Raises:
        ComparisonError: if they take other inputs, or have no site in common.
    """
    check_inputs(a.inputs, b.inputs)
    names_a, names_b = ([site for site, _ in program.sites()] for program in (a, b))
    common = set(names_a) & set(names_b)
    if not common:
        raise ComparisonError("programs", "have no site in common", "Compare programs of the same source.")
    replay = Replay(b, args)
    waiting: tuple[dict[str, Watched], dict[str, Watched]] = ({}, {})
    found: dict[str, LayerError] = {}
    outputs: list[Tensor] = []
    for pair in zip_longest(_watch_only(a, args, common), _watch_only(b, args, common)):
        for side, seen in zip(waiting, pair, strict=True):
            if isinstance(seen, Watched):
                side[seen.site] = seen
            elif isinstance(seen, Tensor):
                outputs.append(seen)
        for site in waiting[0].keys() & waiting[1].keys():
            found[site] = _compared(waiting[0].pop(site), waiting[1].pop(site), replay)
    output = error_numbers(*_same_shape("output", *outputs))
    ordered = tuple(found[name] for name in names_a if name in common)
    only_a, only_b = (tuple(n for n in names if n not in common) for names in (names_a, names_b))
    return Comparison(ordered, output, only_a, only_b)


def _watch_only(program: Program, args: Sequence[Tensor], sites: set[str]) -> Iterator[Watched | Tensor]:
    """These sites, then the output: programs that share them stay in step."""
    return (seen for seen in watch(program, args) if isinstance(seen, Tensor) or seen.site in sites)


def check_inputs(a: Sequence[object], b: Sequence[object]) -> None:
    """Refuses models that cannot be given the same inputs."""
    if tuple(a) != tuple(b):
        raise ComparisonError("inputs", f"of the second are {_shown(b)}; expected {_shown(a)}", "Give the same source.")


def _shown(specs: Sequence[object]) -> str:
    return ", ".join(f"{getattr(s, 'name', s)} {list(getattr(s, 'shape', ()))}" for s in specs)


def _compared(a: Watched, b: Watched, replay: "Replay") -> LayerError:
    arrives = error_numbers(*_same_shape(a.site, a.y, b.y))
    _same_shape(a.site, a.x, b.x)
    return LayerError(a.site, arrives, error_numbers(a.y, replay(a.site, a.x)))


def _same_shape(site: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim == b.ndim == 3 and 1 in (a.shape[1], b.shape[1]) and a.shape[::2] == b.shape[::2]:
        tokens = max(a.shape[1], b.shape[1])
        return a.expand(-1, tokens, -1), b.expand(-1, tokens, -1)
    if a.shape != b.shape:
        raise ComparisonError(site, f"is {list(a.shape)} in one and {list(b.shape)} in the other", "Give one source.")
    return a, b


class Replay:
    """One site of a program on an input that is given, at the samples' own timesteps.

    inputs: the node by site that is given; what the site reads before smoothing, unless named.
    """

    def __init__(self, program: Program, args: Sequence[Tensor], inputs: Mapping[str, fx.Node] | None = None) -> None:
        placeholders = (node for node in program.graph.nodes if node.op == "placeholder")
        self.program, self.known = program, dict(zip(placeholders, args, strict=True))
        self.layers, self.inputs = dict(program.sites()), {**site_inputs(program), **(inputs or {})}

    @torch.no_grad()
    def __call__(self, site: str, x: Tensor) -> Tensor:
        known: Mapping[fx.Node, Tensor] = {**self.known, self.inputs[site]: x}
        return evaluate(self.program, output_of(self.layers[site]), known)
