"""The module that training runs: the program's arithmetic to float rounding, in fewer and cheaper steps.

    op(Ĥ·q, W)  =  op(q, Ĥ·W)        along the input channels, since Ĥ is symmetric and zeros stay zeros

So the rotation back moves from the activation to the quantised weight wherever that has fewer values, forward and
backward. hqc's operators are called without the dispatcher, whose cost outweighs small tensors. Neither changes the
Program: what is trained is written back into it by name.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from hqc.ops.bounded import FakeQuantizeBounded
from hqc.ops.fake_quantize import FakeQuantize
from hqc.ops.hadamard import Hadamard
from hqc.ops.residual import FakeQuantizeResidual
from hqc.ops.softmax_quantize import SoftmaxQuantize
from hqc.ops.straight_through import RoundSte
from hqc.passes.rewriting import CONV, LINEAR, layer_inputs
from hqc.program import Program, is_op

__all__ = ["training_module", "without_dispatcher"]

ops = torch.ops.hqc


def training_module(program: Program, batch: int) -> nn.Module:
    """A private module of a quantised program. batch: samples of a call, which decide what is cheaper to rotate.

    Weights are those of the program until they are replaced.
    """
    module = program.module()
    for node in list(module.graph.nodes):
        if is_op(node, CONV, LINEAR) and node.meta.get("role") == "layer":
            _rotate_weight(module.graph, node, batch)
    module.graph.eliminate_dead_code()
    return without_dispatcher(module)


def without_dispatcher(module: fx.GraphModule) -> fx.GraphModule:
    """The same module, changed to call hqc's operators without the dispatcher."""
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in _DIRECT:
            node.target = _DIRECT[node.target]
    module.recompile()
    return module


def _rotate_weight(graph: fx.Graph, layer: fx.Node, batch: int) -> None:
    """Moves the rotation back from a layer's input to its weight, if that has fewer values."""
    x, weight, _ = layer_inputs(layer)
    if not is_op(x, ops.hadamard.default) or x.meta.get("role") != "rotation_back":
        return
    sizes = [batch if isinstance(size, str) else size for size in x.meta.get("shape", ())]
    shape = weight.meta.get("shape", ())
    if not sizes or not shape or math.prod(shape) >= math.prod(sizes):
        return
    quantised, block, axis, *kind = x.args
    if shape[1] != sizes[int(axis)]:  # type: ignore[arg-type]
        return  # a grouped convolution
    with graph.inserting_before(layer):
        rotated = graph.call_function(ops.hadamard.default, (weight, block, axis if axis == 1 else -1, *kind))
    layer.args = (quantised, rotated, *layer.args[2:])


def _hadamard(x: Tensor, block: int, axis: int, regular: bool = False) -> Tensor:
    return Hadamard.apply(x, block, axis, regular)  # type: ignore[no-any-return,no-untyped-call]


def _fake_quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    return FakeQuantize.apply(x, scale, qmin, qmax)  # type: ignore[no-any-return,no-untyped-call]


def _fake_quantize_bounded(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return FakeQuantizeBounded.apply(x, scale, low, high)  # type: ignore[no-any-return,no-untyped-call]


def _fake_quantize_residual(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, step: Tensor) -> Tensor:
    return FakeQuantizeResidual.apply(x, scale, low, high, step)  # type: ignore[no-any-return,no-untyped-call]


def _round_ste(x: Tensor) -> Tensor:
    return RoundSte.apply(x)  # type: ignore[no-any-return,no-untyped-call]


def _softmax_quantize(p: Tensor, scale: Tensor, log2: Tensor, bits: int) -> Tensor:
    return SoftmaxQuantize.apply(p, scale, log2, bits)  # type: ignore[no-any-return,no-untyped-call]


_DIRECT: Mapping[Any, Callable[..., Tensor]] = {
    ops.hadamard.default: _hadamard,
    ops.fake_quantize.default: _fake_quantize,
    ops.fake_quantize_bounded.default: _fake_quantize_bounded,
    ops.fake_quantize_residual.default: _fake_quantize_residual,
    ops.round_ste.default: _round_ste,
    ops.softmax_quantize.default: _softmax_quantize,
}
