"""What every program must satisfy, stage by stage; checked after each pass."""

from collections.abc import Callable, Mapping

import torch

import hqc.ops  # noqa: F401  (registers the operators)
from hqc.errors import PassError
from hqc.operators import admitted_name
from hqc.program import ALLOWED_FUNCTIONS, Program, Stage

__all__ = ["verify"]

ops = torch.ops.hqc

_TRAINING_OPS: set[object] = {
    ops.fake_quantize.default,
    ops.fake_quantize_bounded.default,
    ops.fake_quantize_residual.default,
    ops.fake_quantize_grouped.default,
    ops.round_ste.default,
}
_INTEGER_OPS: set[object] = {
    ops.quantize.default,
    ops.quantize_bounded.default,
    ops.quantize_grouped.default,
    ops.dequantize.default,
    ops.dequantize_grouped.default,
    ops.unpack_int4.default,
    ops.lookup.default,
    ops.rotate_codes.default,
    ops.digit.default,
    ops.int_linear.default,
    ops.int_conv2d.default,
    ops.rescale.default,
}
_QUANTISING_OPS: set[object] = {ops.softmax_quantize.default, ops.dynamic_scale.default}
"""In float before freezing and after."""
_FORBIDDEN: Mapping[Stage, set[object]] = {
    Stage.CAPTURED: _TRAINING_OPS | _INTEGER_OPS | _QUANTISING_OPS,
    Stage.QUANTISED: _INTEGER_OPS,
    Stage.TRAINED: _INTEGER_OPS,
    Stage.INTEGER: _TRAINING_OPS,
}


def verify(program: Program, after: str = "verify") -> None:
    """Checks the graph, its weights, and the stage's rules.

    Raises:
        PassError: naming the pass it ran after and every violation.
    """
    problems = [problem for check in _CHECKS for problem in check(program)]
    if problems:
        raise PassError(after, "; ".join(problems[:5]), "Report a bug: a pass broke its contract.")


def _check_graph(program: Program) -> list[str]:
    try:
        program.graph.lint()
    except RuntimeError as error:
        return [f"the graph is malformed ({error})"]
    problems = []
    for node in program.graph.nodes:
        if node.op == "call_function" and not _allowed(node.target):
            problems.append(f"{node.name} calls {node.target}")
        if node.op in ("call_module", "call_method"):
            problems.append(f"{node.name} is a {node.op}")
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    if names != [spec.name for spec in program.inputs]:
        problems.append(f"inputs are {names}")
    return problems


def _allowed(target: object) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return admitted_name(target)
    return any(target is function for function in ALLOWED_FUNCTIONS.values())


def _check_state(program: Program) -> list[str]:
    used = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    problems = [f"weight {name} is missing" for name in sorted(used - program.state.keys())]
    for node in program.graph.nodes:
        tensor = program.state.get(str(node.target)) if node.op == "get_attr" else None
        if tensor is not None and tuple(tensor.shape) != tuple(node.meta.get("shape", tensor.shape)):
            problems.append(f"weight {node.target} is {list(tensor.shape)}; the graph says {list(node.meta['shape'])}")
    problems += [f"weight {name} is unused" for name in sorted(program.state.keys() - used)]
    for name, tensor in program.state.items():
        if name.endswith(("_scale", "scale_table")) and not bool((tensor > 0).all() & tensor.isfinite().all()):
            problems.append(f"{name} has a scale that is not positive and finite")
        if name.endswith(".smoothing") and not bool((tensor > 0).all() & tensor.isfinite().all()):
            problems.append(f"{name} has a factor that is not positive and finite")
        if name.endswith(("_zero", "zero_table")) and not bool(tensor.isfinite().all()):
            problems.append(f"{name} has a zero point that is not finite")
    return problems


def _check_stage(program: Program) -> list[str]:
    forbidden = _FORBIDDEN[program.stage]
    return [
        f"{node.name} ({node.target}) does not belong in a program that is {program.stage}"
        for node in program.graph.nodes
        if node.op == "call_function" and node.target in forbidden
    ]


def _check_plan(program: Program) -> list[str]:
    sites = {site for site, _ in program.sites()}
    return [
        f"the plan names {plan.site}, which the graph lacks" for plan in program.plan.sites if plan.site not in sites
    ]


_CHECKS: tuple[Callable[[Program], list[str]], ...] = (_check_graph, _check_state, _check_stage, _check_plan)
