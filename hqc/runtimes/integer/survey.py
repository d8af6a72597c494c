"""What a runtime of integer products does not take of a program, by its own form and before any kernel is compiled."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal, get_args

import torch

from hqc.errors import ExportError, RuntimeMissingError
from hqc.export.attention_notes import attention_note
from hqc.export.surveys import Obstacle, Survey
from hqc.program import Program
from hqc.runtimes.integer.forms import site_refusals, unchecked_form
from hqc.runtimes.integer.weights import site_weight
from hqc.sites import quantised_sites

__all__ = ["INTEGER_RUNTIMES", "IntegerRuntime", "survey_runtime"]

IntegerRuntime = Literal["torch-int8", "torch-cuda"]
INTEGER_RUNTIMES: tuple[str, ...] = get_args(IntegerRuntime)


def survey_runtime(program: Program, runtime: IntegerRuntime) -> Survey:
    """What runs of a program, and the sites that do not; operators that are no product are torch's own.

    Whether this machine has the runtime is not asked: `hqc doctor` says that.
    """
    try:
        integer = unchecked_form(program, runtime)
    except (ExportError, RuntimeMissingError) as error:
        return Survey(runtime, {}, (Obstacle("", (), f"{error.where}: {error.found}", error.do),))
    obstacles = tuple(_grouped([*site_refusals(integer)] or _wide_weights(integer)))
    called = (node.target for node in integer.graph.nodes if isinstance(node.target, torch._ops.OpOverload))
    return Survey(runtime, dict(sorted(Counter(map(str, called)).items())), obstacles, attention_note(program, runtime))


def _wide_weights(integer: Program) -> Iterator[ExportError]:
    """Weights that no two digits hold."""
    for site in quantised_sites(integer):
        try:
            site_weight(integer, site, device=torch.device("cpu"), pack=False)
        except ExportError as error:
            yield error


def _grouped(refused: Iterable[ExportError]) -> Iterator[Obstacle]:
    """One obstacle for all sites that are refused for one reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for error in refused:
        groups.setdefault((error.found, error.do), []).append(error.where.removeprefix("site "))
    for (found, do), sites in groups.items():
        yield Obstacle("site", tuple(sites), found, do)
