"""From an `nn.Module` to a Program's graph: torch.export, then weights as named attributes and shapes as plain data."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from hqc.capture.finite import require_finite
from hqc.checking import check_calls
from hqc.errors import CaptureError
from hqc.graph_json import graph_from_json, graph_to_json
from hqc.program import BATCH, InputSpec, Origin, Program, aten, is_op
from hqc.running import run_module
from hqc.wording import first_words

__all__ = ["LAYER_OPS", "capture_module"]

LAYER_OPS = {aten.conv2d.default: "conv2d", aten.linear.default: "linear"}

# Checks that torch.export leaves in the graph; the captured graph is verified by running it.
_CHECKS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
)

# diffusers' upsamplers branch on a batch of 64; the branch only changes the memory layout.
_CAPTURE_BATCH = torch.export.Dim("batch", min=1, max=63)


# How torch speaks of a batch that is not free: in its own symbols.
_SYMBOLS = re.compile(r"\bs\d+\b|Expected op to be|Constraints violated|\bbatch [<>=]")

_LARGE_MODEL = 2**30
_LABELS = "Give labels as a torch.int64 example, whose largest value bounds them."


class _Wrapper(nn.Module):
    """Gives the captured weights one known prefix."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> Tensor:
        output = self.model(*args)
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def capture_module(
    module: nn.Module, inputs: Sequence[InputSpec], origin: Origin | None = None, *, prefix: str = ""
) -> Program:
    """Captures `module(*inputs) -> Tensor` with a dynamic batch and checks graph against module.

    Requires: positional inputs as in `inputs`, the first axis of each being the batch; eval mode semantics.
    Ensures: the graph, captured at batch 2, equals the module on fixed inputs at batch 1 and, where the weights are
    below 1 GiB, at batch 3; the largest relative error is kept in
    `origin.capture_error`. prefix: what the names of weights in messages go without.

    Raises:
        CaptureError: if torch.export cannot capture it, a weight is NaN or infinite, or the graph does not reproduce
            the module.
    """
    module = module.eval().requires_grad_(False)
    example = _examples(inputs, batch=2)
    shapes = tuple({i: _CAPTURE_BATCH for i, d in enumerate(spec.shape) if d == BATCH} for spec in inputs)
    try:
        exported = torch.export.export(_Wrapper(module), example, dynamic_shapes=(shapes,))
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if _SYMBOLS.search(first):
            raise CaptureError(
                type(module).__name__,
                "works for some batch sizes only: it branches on the batch, or folds another axis (frames) into it",
                "Make every size but the first axis a plain number, and let no code depend on the batch.",
            ) from error
        raise CaptureError(
            type(module).__name__,
            f"torch.export could not capture it ({first[:160]})",
            "Run torch.export.draft_export on the module to see where, and make that part exportable.",
        ) from error
    if any(_mutates(node) for node in exported.graph.nodes):
        # In-place operators become functional ones, and what they leave behind shows in the signature.
        exported = exported.run_decompositions({})
    _check_pure(exported, module)
    try:
        graph, state = _plain_graph(exported, [spec.name for spec in inputs])
    except (TypeError, ValueError) as error:
        raise CaptureError(
            type(module).__name__,
            f"cannot be written as a graph ({error})",
            "Rename or replace that part of the module.",
        ) from error
    learnt = {name.removeprefix("model.") for name in exported.graph_signature.inputs_to_parameters.values()}
    require_finite((origin and origin.source) or type(module).__name__, state, learnt, prefix)
    program = Program(graph=graph, state=state, inputs=tuple(inputs), origin=origin or Origin())
    _check_loadable(program, module)
    batches = (1, 3) if program.size_bytes() < _LARGE_MODEL else (1,)
    worst = max(_relative_error(program, module, _examples(inputs, batch, seed=batch)) for batch in batches)
    if not worst < float("inf"):
        raise CaptureError(
            type(module).__name__,
            "gives NaN or infinity for random inputs, and its weights are finite",
            "Run it in PyTorch to see where values overflow.",
        )
    if not worst <= 1e-4:
        raise CaptureError(
            type(module).__name__,
            f"the captured graph differs from the module by {worst:.1e} relative; expected at most 1e-4",
            "The module depends on something besides its inputs (a counter, random numbers): make it a pure function.",
        )
    return program.evolve(origin=Origin(**{**vars(program.origin), "capture_error": worst}))


def _check_loadable(program: Program, module: nn.Module) -> None:
    """What is traced can be loaded: the same checks as there."""
    try:
        check_calls(program)
    except ValueError as error:
        raise CaptureError(
            type(module).__name__,
            f"cannot be a Program ({error})",
            "Rewrite that part of the module with the operators of hqc/operators.py.",
        ) from error


def _check_pure(exported: torch.export.ExportedProgram, module: nn.Module) -> None:
    signature = exported.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if changed:
        raise CaptureError(
            type(module).__name__,
            f"changes {str(changed[0]).removeprefix('model.')} when it is called",
            "Make it a pure function of its inputs: no counters, no running statistics, no inputs written in place.",
        )
    if len(signature.user_outputs) != 1 or signature.user_outputs[0] is None:
        raise CaptureError(
            type(module).__name__,
            f"returns {len(signature.user_outputs)} values; expected one tensor",
            "Wrap it in a module that returns the predicted noise alone.",
        )


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _examples(inputs: Sequence[InputSpec], batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(spec.example(batch, generator) for spec in inputs)


@torch.no_grad()
def _relative_error(program: Program, module: nn.Module, args: tuple[Tensor, ...]) -> float:
    try:
        wanted = _Wrapper(module)(*args)
    except Exception as error:  # the module is the user's
        raise CaptureError(
            type(module).__name__,
            f"cannot be run on random inputs ({type(error).__name__}: {first_words(error, 100)})",
            _LABELS if isinstance(error, IndexError) else "hqc draws normal numbers: let the module take any.",
        ) from error
    return float((run_module(program.module(), *args) - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _plain_graph(exported: torch.export.ExportedProgram, names: Sequence[str]) -> tuple[fx.Graph, dict[str, Tensor]]:
    signature = exported.graph_signature
    lifted = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors: dict[str, Tensor] = {**exported.state_dict, **exported.constants}
    user = iter(names)
    graph, state, mapping = fx.Graph(), dict[str, Tensor](), dict[fx.Node, fx.Node]()
    for node in exported.graph.nodes:
        if is_op(node, *_CHECKS):
            continue
        if node.op == "placeholder" and node.name in lifted:
            name = lifted[node.name].removeprefix("model.")
            state[name] = tensors[lifted[node.name]].detach()
            alias = f"{name}_weight" if name in names else name.replace(".", "_")
            mapping[node] = graph.create_node("get_attr", name, name=alias)
        elif node.op == "placeholder":
            mapping[node] = graph.placeholder(next(user))
        elif node.op == "output":
            (result,) = node.args[0]
            graph.output(mapping[result])
            continue
        else:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
        mapping[node].meta = {**_shape_meta(node), **_scope_meta(node)}
    graph.eliminate_dead_code()
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    _name_sites(graph)
    # Through the text form once, so that what is saved and what is run are the same graph.
    return graph_from_json(graph_to_json(graph)), {k: v for k, v in state.items() if k in used}


def _shape_meta(node: fx.Node) -> dict[str, Any]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return {}
    # An expression that cancelled to a number, such as 32·N // N, still comes as a symbol.
    names = [d if isinstance(d, int) else _batch_name(str(d)) for d in value.shape]
    shape = tuple(int(d) if isinstance(d, str) and d.isdecimal() else d for d in names)
    return {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}


def _scope_meta(node: fx.Node) -> dict[str, str]:
    """The path of the innermost module whose forward made the call; nothing for calls of the model's own."""
    *_, (path, _) = (node.meta.get("nn_module_stack") or {"": ("", "")}).values()
    return {"scope": path.removeprefix("model.")} if path.startswith("model.") else {}


def _batch_name(expression: str) -> str:
    """torch's symbol for the batch (s77, …) written as N, also inside expressions such as 4*N."""
    return re.sub(r"\bs\d+\b", BATCH, expression)


def _name_sites(graph: fx.Graph) -> None:
    """Marks every layer node with its site: its weight's name without `.weight`, numbered when it is used again."""
    seen: Counter[str] = Counter()
    for node in graph.nodes:
        if not is_op(node, *LAYER_OPS) or not isinstance(node.args[1], fx.Node) or node.args[1].op != "get_attr":
            continue
        name = str(node.args[1].target).removesuffix(".weight")
        seen[name] += 1
        node.meta["site"] = name if seen[name] == 1 else f"{name}@{seen[name]}"
        node.meta["role"] = "layer"
