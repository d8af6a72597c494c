"""From a quantised program to a module whose products run in the kernels."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from hqc.export.attention_notes import attention_note
from hqc.passes.rewriting import Rewriter
from hqc.program import Program, aten, is_op
from hqc.runtimes.integer.cuda.side_stream import add_side_stream
from hqc.runtimes.integer.forms import integer_form
from hqc.runtimes.integer.fusions import fuse
from hqc.runtimes.integer.kernel_set import Kernels
from hqc.runtimes.integer.layers import IntegerLayer
from hqc.runtimes.integer.place import drop_dead, place_kernels
from hqc.runtimes.integer.precision import set_precision
from hqc.runtimes.integer.report import build_report
from hqc.runtimes.integer.tidy import tidied

__all__ = ["BuildOptions", "float_module", "integer_module"]


@dataclass(frozen=True)
class BuildOptions:
    """Where the module lives and what its float part runs in.

    pack: four-bit weights stay packed where they may. fuse: kernels take in what stands before and after them.
    side_stream: what does not depend on the image runs on a stream beside it. runtime: whose name refusals give.
    """

    device: torch.device
    dtype: torch.dtype = torch.float16
    pack: bool = False
    fuse: bool = True
    side_stream: bool = True
    runtime: str = "torch-cuda"


@torch.no_grad()
def integer_module(program: Program, kernels: Kernels, options: BuildOptions) -> fx.GraphModule:
    """module(*inputs) -> float32 output, as the program's; inputs on the device, in the program's dtypes.

    Raises:
        RuntimeMissingError: for a float program. ExportError: for a site that the kernels cannot run.
    """
    placed = place_kernels(
        tidied(integer_form(program, options.runtime)), kernels, device=options.device, pack=options.pack
    )
    records = fuse(placed) if options.fuse else ()
    drop_dead(placed.edit.graph)
    called = [placed.modules[name] for name in _called(placed.edit.graph)]
    report = replace(build_report(called, records), attention=attention_note(program, options.runtime))
    module = _module(placed.edit, placed.modules, options, side=options.side_stream)
    module.meta["report"] = report
    return module


@torch.no_grad()
def float_module(program: Program, options: BuildOptions) -> fx.GraphModule:
    """A float program with the same treatment of its float part: what the integer module is timed against."""
    from hqc.passes.rewriting import rewrite

    return _module(rewrite(tidied(program)), {}, options)


def _module(
    edit: Rewriter, modules: dict[str, nn.Module], options: BuildOptions, *, side: bool = False
) -> fx.GraphModule:
    _fold(edit)
    if options.dtype != torch.float32:
        set_precision(edit, modules, options.dtype)
    _retarget(edit.graph, options.device)
    drop_dead(edit.graph)
    if side:
        add_side_stream(edit.graph, modules, edit.program.inputs[0].name, options.device)
    root = nn.Module()
    for name in _called(edit.graph):
        module = modules.pop(name)
        if isinstance(module, IntegerLayer):
            module.pack()
        root.add_module(name, module)
    convolutions = _convolution_weights(edit.graph)
    for i, node in enumerate([n for n in edit.graph.nodes if n.op == "get_attr"]):
        name = f"tensor_{i}"
        root.register_buffer(name, _on_device(edit.state[str(node.target)], node in convolutions, options.device))
        node.target = name
    return fx.GraphModule(root.to(options.device), edit.graph, "IntegerModule").eval()


def _called(graph: fx.Graph) -> list[str]:
    """The names of the modules that a graph calls, each once."""
    return list(dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module"))


def _fold(edit: Rewriter) -> None:
    """Computes what depends on stored tensors alone, as torch does on the CPU: the reference's own numbers."""
    known: dict[fx.Node, Tensor] = {n: edit.state[str(n.target)] for n in edit.graph.nodes if n.op == "get_attr"}
    for node in list(edit.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not all(i in known for i in node.all_input_nodes):
            continue
        value = node.target(*fx.map_arg(node.args, known.__getitem__), **fx.map_arg(node.kwargs, known.__getitem__))
        if isinstance(value, Tensor):
            stored = edit.weight(f"constants.{node.name}", value.contiguous(), node)
            known[node] = known[stored] = value
            node.replace_all_uses_with(stored)


def _retarget(graph: fx.Graph, device: torch.device) -> None:
    """Tensors that the graph makes are made on the device; the capture named the CPU."""

    def moved(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for node in graph.nodes:
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, moved)
            node.kwargs = fx.node.map_aggregate(node.kwargs, moved)


def _convolution_weights(graph: fx.Graph) -> set[fx.Node]:
    return {n.args[1] for n in graph.nodes if is_op(n, aten.conv2d.default, aten.conv2d.padding)}


def _on_device(tensor: Tensor, convolution: bool, device: torch.device) -> Tensor:
    moved = tensor.detach().to(device)
    # With its weight channels-last, a float convolution computes and returns channels-last.
    return (
        moved.contiguous(memory_format=torch.channels_last) if convolution and moved.ndim == 4 else moved.contiguous()
    )
