"""Running a program's graph, and saying in a line which node cannot go on.

Loading checks types and shapes; what depends on values (an index out of range, a division by zero) shows here alone.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from hqc.errors import EvaluationError, HqcError, MemoryShortError, is_memory_error
from hqc.wording import first_words

__all__ = ["module_failure", "node_failure", "run_module"]


def run_module(module: nn.Module, *args: Any) -> Tensor:
    """module(*args) of a program's module.

    Raises:
        EvaluationError: naming the node that cannot be computed. MemoryShortError: if memory ran out there.
    """
    try:
        return module.forward(*args)  # type: ignore[no-any-return]  # not __call__, which prints what it raises
    except HqcError:
        raise
    except Exception as error:  # whatever an operator raises
        raise module_failure(module, args, error) from error


def module_failure(module: nn.Module, args: tuple[Any, ...], error: Exception) -> HqcError:
    """The error of a module's call with its node, which only a run node by node tells."""
    if isinstance(module, fx.GraphModule) and not is_memory_error(error):
        try:
            _Finder(module, garbage_collect_values=True).run(*args)
        except HqcError as found:
            return found
    return _failure("the model", error)


class _Finder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        self.extra_traceback = False
        try:
            return super().run_node(n)
        except Exception as error:
            raise node_failure(n, error) from error


def node_failure(node: fx.Node, error: Exception) -> HqcError:
    """What to say of a node that raised an error."""
    target: Any = node.target
    name = str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    return _failure(f"node {node.name!r} ({name})", error)


def _failure(where: str, error: Exception) -> HqcError:
    if isinstance(error, HqcError):
        return error
    if is_memory_error(error):
        return MemoryShortError(where, "there is not enough memory for it", "Run fewer samples at once.")
    if isinstance(error, IndexError):
        do = "An input is out of range: give labels that the model was trained on."
    else:
        do = "Check the inputs; a program from elsewhere: trace it again."
    return EvaluationError(where, f"cannot be computed ({first_words(error, 120)})", do)
