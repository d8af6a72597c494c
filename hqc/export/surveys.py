"""What a target does not take of a program, by the target's own lowering and before any long work.

Every node is translated as an export would; where that fails, a value of the noted shape stands in for the result, and
the walk goes on. Nothing is written and no weight is copied.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import onnx_ir as ir
import torch
from torch import fx

from hqc.errors import ExportError
from hqc.export.attention_notes import attention_note
from hqc.export.builder import typed
from hqc.export.lowering import Lowering, is_size, onnx_dtype
from hqc.export.onnxruntime import OnnxRuntimeLowering
from hqc.export.portable import PortableLowering
from hqc.export.prepare import Target, prepare
from hqc.export.tensorrt.forms import layer_forms
from hqc.export.tensorrt.lowering import TensorRtLowering
from hqc.export.tensorrt.options import TensorRtOptions
from hqc.program import Program
from hqc.wording import first_words, listed

__all__ = ["Obstacle", "Survey", "require_taken", "survey", "survey_targets"]

_OPSET = 21


@dataclass(frozen=True)
class Obstacle:
    """One thing that a target does not take, its nodes, why.

    operator: or "site", where a product is refused as a whole; empty for the program as a whole.
    """

    operator: str
    nodes: tuple[str, ...]
    found: str
    do: str

    def __str__(self) -> str:
        where = f"{self.operator} ({listed(self.nodes)}): " if self.operator else ""
        return f"{where}{self.found}. {self.do}"


@dataclass(frozen=True)
class Survey:
    """How often a target takes each operator of a program, and what it does not take.

    target: an export's, or a runtime that computes programs themselves.
    attention: how it runs attention that is quantised, empty where none is.
    """

    target: str
    taken: Mapping[str, int]
    obstacles: tuple[Obstacle, ...]
    attention: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "target": self.target,
            "takes": dict(self.taken),
            "does_not_take": [asdict(obstacle) for obstacle in self.obstacles],
            **({"attention": self.attention} if self.attention else {}),
        }


def survey(program: Program, target: Target) -> Survey:
    """What a target takes of a program at any stage, and what it does not."""
    try:
        lowering = _lowering(prepare(program, target), target)
    except ExportError as error:
        return Survey(target, {}, (Obstacle("", (), f"{error.where}: {error.found}", error.do),))
    taken: Counter[str] = Counter()
    refused: list[tuple[fx.Node, ExportError]] = []
    for node in lowering.program.graph.nodes:
        refusal = _refusal(lowering, node)
        if refusal is not None:
            refused.append((node, refusal))
        elif isinstance(node.target, torch._ops.OpOverload) and not is_size(node):
            taken[str(node.target)] += 1
    return Survey(target, dict(sorted(taken.items())), tuple(_grouped(refused)), attention_note(program, target))


def survey_targets(program: Program) -> tuple[Survey, ...]:
    """The same for every target."""
    return tuple(survey(program, target) for target in get_args(Target))


def require_taken(program: Program, target: Target) -> None:
    """Refuses before long work what the target would refuse after it.

    Raises:
        ExportError: naming the first thing that it does not take.
    """
    for obstacle in survey(program, target).obstacles:
        where = f"{obstacle.operator} ({listed(obstacle.nodes)}), which " if obstacle.operator else ""
        raise ExportError(f"target {target}", f"does not take {where}{obstacle.found}", obstacle.do)


def _lowering(prepared: Program, target: Target) -> Lowering:
    """The target's lowering before it has begun.

    Raises:
        ExportError: for a site that has no form.
    """
    if target == "portable":
        return PortableLowering(prepared, _OPSET)
    if target == "onnxruntime":
        return OnnxRuntimeLowering(prepared, _OPSET)
    options = TensorRtOptions()
    return TensorRtLowering(prepared, _OPSET, options, layer_forms(prepared, options))


def _refusal(lowering: Lowering, node: fx.Node) -> ExportError | None:
    """Translates one node; where that fails, says why and puts a stand-in in its place."""
    if not lowering.knows(node):
        error = ExportError(f"node {node.name}", "has no ONNX translation", "Use other layers, or the torch runtime.")
    else:
        try:
            lowering.translate(node)
        except ExportError as found:
            error = found
        except Exception as found:  # whatever arguments that a translation does not expect make it raise
            error = ExportError(
                f"node {node.name}", f"has arguments that are not expected ({first_words(found)})", "Use other layers."
            )
        else:
            return None
    lowering.values[node] = _StandIns() if _several(node) else _stand_in(node)
    return error


def _several(node: fx.Node) -> bool:
    return bool(node.users) and all(getattr(user.target, "__name__", "") == "getitem" for user in node.users)


def _stand_in(node: fx.Node) -> ir.Value:
    dtype = node.meta.get("dtype", "float32")
    return typed(ir.Value(name=f"{node.name}.stand_in"), onnx_dtype(dtype), node.meta.get("shape"))


class _StandIns:
    """One for each part of a result that has several."""

    def __getitem__(self, index: int) -> ir.Value:
        return ir.Value(name=f"part_{index}.stand_in")


def _grouped(refused: Iterable[tuple[fx.Node, ExportError]]) -> Iterator[Obstacle]:
    """One obstacle for all nodes of an operator that are refused for one reason."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for node, error in refused:
        operator = str(node.target) if node.op == "call_function" else ""
        groups.setdefault((operator, error.found, error.do), []).append(node.name)
    for (operator, found, do), names in groups.items():
        yield Obstacle(operator, tuple(names), found, do)
