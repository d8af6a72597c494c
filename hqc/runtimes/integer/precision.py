"""Which part of a graph runs in half precision, and the casts at its border.

What is one vector a sample (inputs of at most two axes, and whatever depends on them alone: the timestep and its
embedding, labels, sizes, pooled text) stays in float32: it is small, sin(1000·f) needs the digits, and every block
reads it. The rest, what depends on the sample or on tokens, runs in the given dtype. Kernels take and give either;
scales are float32 always.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from hqc.passes.rewriting import Rewriter
from hqc.program import aten, is_op
from hqc.runtimes.integer.layers import IntegerLayer, KernelCall

__all__ = ["set_precision"]

_NARROW_AXES = 3


def set_precision(edit: Rewriter, modules: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
    """Casts the graph in `edit`, in place, to `dtype` where it may; the output is float32."""
    kinds = _Kinds(edit, modules, dtype)
    for node in list(edit.graph.nodes):
        kinds.visit(node)


class _Kinds:
    """One walk over the graph: which nodes are narrow, and the narrow copy of every wide one that narrow ones read."""

    def __init__(self, edit: Rewriter, modules: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
        self._edit, self._modules, self._dtype = edit, modules, dtype
        self._narrow: set[fx.Node] = set()
        self._copies: dict[fx.Node, fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        """Decides one node; its inputs have been decided."""
        if node.op == "placeholder":
            self._enter(node)
        elif node.op == "call_module":
            self._module(node)
        elif node.op == "call_function" and self._depends(node.all_input_nodes):
            self._function(node)
        elif node.op == "output":
            self._leave(node)

    def _depends(self, inputs: Iterable[fx.Node]) -> bool:
        return any(node in self._narrow for node in inputs)

    def _enter(self, node: fx.Node) -> None:
        if len(node.meta["shape"]) < _NARROW_AXES or not _is_float(node):
            return
        readers = list(node.users)
        inner = self._cast(node, node.next)
        for reader in readers:
            # Sizes are read off the input itself.
            if _is_tensor(reader):
                reader.replace_input_with(node, inner)

    def _module(self, node: fx.Node) -> None:
        module = self._modules[str(node.target)]
        if isinstance(module, IntegerLayer):
            if self._depends(node.args[:1]):  # type: ignore[arg-type]
                self._narrow.add(node)
                module.dtype = self._dtype
            if isinstance(node.kwargs.get("residual"), fx.Node):
                self._fit_residual(node, module)
            return
        assert isinstance(module, KernelCall)
        given = [_argument(node, key) for key in module.activations]
        activations = [argument for argument in given if isinstance(argument, fx.Node)]
        if self._depends(activations):
            self._narrow.add(node)
            for wide in activations:
                if wide not in self._narrow:
                    node.replace_input_with(wide, self._copy(wide))

    def _fit_residual(self, node: fx.Node, module: IntegerLayer) -> None:
        """A residual has the product's own dtype; a wide product with a narrow one becomes narrow."""
        residual = node.kwargs["residual"]
        assert isinstance(residual, fx.Node)
        if residual in self._narrow and node not in self._narrow:
            self._narrow.add(node)
            module.dtype = self._dtype
        if node in self._narrow and residual not in self._narrow:
            node.update_kwarg("residual", self._copy(residual))

    def _function(self, node: fx.Node) -> None:
        if not _is_tensor(node):
            return
        self._narrow.add(node)
        for wide in node.all_input_nodes:
            if wide not in self._narrow and _is_float(wide):
                node.replace_input_with(wide, self._copy(wide))
        node.args, node.kwargs = self._dtypes(node.args), self._dtypes(node.kwargs)

    def _dtypes(self, arguments: Any) -> Any:
        """float32 among a narrow call's arguments is what the capture ran in: the given dtype instead."""
        return fx.node.map_aggregate(arguments, lambda a: self._dtype if a is torch.float32 else a)

    def _leave(self, node: fx.Node) -> None:
        (result,) = node.args
        assert isinstance(result, fx.Node)
        if result not in self._narrow or not _is_float(result):
            return
        module = self._modules.get(str(result.target)) if result.op == "call_module" else None
        if isinstance(module, IntegerLayer) and "residual" not in result.kwargs and len(result.users) == 1:
            module.dtype = torch.float32  # written once, unrounded
            return
        with self._edit.graph.inserting_before(node):
            wide = self._edit.graph.call_function(aten.to.dtype, (result, torch.float32))
        node.update_arg(0, wide)

    def _copy(self, wide: fx.Node) -> fx.Node:
        """A narrow copy: of a weight another stored tensor, of anything else a cast behind it."""
        if wide not in self._copies:
            self._copies[wide] = self._stored(wide) if wide.op == "get_attr" else self._cast(wide, wide.next)
        return self._copies[wide]

    def _stored(self, node: fx.Node) -> fx.Node:
        value: Tensor = self._edit.state[str(node.target)]
        return self._edit.weight(
            f"{node.target}.{str(self._dtype).removeprefix('torch.')}", value.to(self._dtype), node.next
        )

    def _cast(self, node: fx.Node, before: fx.Node) -> fx.Node:
        cast = self._edit.call(before, aten.to.dtype, node, self._dtype, like=node)
        self._narrow.add(cast)
        return cast


def _argument(node: fx.Node, key: int | str) -> Any:
    if isinstance(key, str):
        return node.kwargs.get(key)
    return node.args[key] if key < len(node.args) else None


def _is_float(node: fx.Node) -> bool:
    return node.meta.get("dtype") == "float32"


def _is_tensor(node: fx.Node) -> bool:
    """Whether a node gives a tensor or several; sizes and numbers are none."""
    several = isinstance(node.target, torch._ops.OpOverload) and not is_op(node, aten.sym_size.int)
    return "dtype" in node.meta or several
