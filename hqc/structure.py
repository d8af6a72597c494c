"""What passes, calibration and exports rely on at the sites of a program: roles, operators, and the plan's numbers.

A program that hqc made always satisfies this; one from elsewhere may not, and is refused when it is loaded.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

import hqc.ops  # noqa: F401  (registers the operators)
from hqc.attention_checks import ATTENTION_ROLES, attention_problems
from hqc.bounds import DEQUANTISERS, FAKE_QUANTISERS, QUANTISERS
from hqc.code_checks import activation_codes_fit, weight_codes_problem
from hqc.group_checks import group_problem
from hqc.plan import SitePlan
from hqc.program import Program, Stage, aten, is_op
from hqc.rotations import Rotation
from hqc.site_names import main_site
from hqc.sites import output_of, rotation_of, rotation_within, source_of, with_residual
from hqc.styles.checks import style_problems

__all__ = ["site_problems"]

ops = torch.ops.hqc
_CONV, _LINEAR, _RESCALE = aten.conv2d.default, aten.linear.default, ops.rescale.default
_OF_ONE_VALUE = (
    *(aten.to.dtype, aten.view.default, ops.dynamic_scale.default, ops.hadamard.default, ops.rotate_codes.default),
    *(ops.unpack_int4.default, ops.digit.default, ops.half.default),
)
_PRODUCTS = (ops.int_linear.default, ops.int_conv2d.default)
_ROLES: Mapping[str, tuple[Any, ...]] = {
    "layer": (_CONV, _LINEAR, _RESCALE),
    "activation_quantizer": FAKE_QUANTISERS,
    "weight_quantizer": FAKE_QUANTISERS,
    "shift": (aten.sub.Tensor,),
    "smoothing": (aten.mul.Tensor,),
    "branch": (aten.add.Tensor,),
    "residual": (aten.add.Tensor,),
    **dict.fromkeys(("branch_down", "branch_up", "style_down", "style_up"), (_CONV, _LINEAR)),
    "style": (aten.add.Tensor,),
    "style_scaled": (aten.mul.Tensor,),
    "style_scale": (aten.view.default,),
    "rotation": (ops.hadamard.default,),
    "rotation_back": (ops.hadamard.default,),
    "lora": (aten.add.Tensor,),
    "row": (ops.nearest_timestep.default,),
    "codes": QUANTISERS,
    "dynamic_scale": (ops.dynamic_scale.default,),
    "attention": (aten.matmul.default,),
    "operand_quantizer": FAKE_QUANTISERS,
    "operand_codes": QUANTISERS,
    "operand": (ops.dequantize.default,),
    "softmax_quantizer": (ops.softmax_quantize.default,),
    "activation": DEQUANTISERS,
    "product": _PRODUCTS,
    "weight": (
        *(*DEQUANTISERS, ops.rotate_codes.default, ops.unpack_int4.default),
        *(ops.lookup.default, ops.digit.default, ops.half.default, aten.to.dtype),
    ),
}
_OF_QUANTISED = (
    "activation_quantizer",
    "weight_quantizer",
    "dynamic_scale",
    "lora",
    "codes",
    "product",
    "shift",
    "smoothing",
    "branch",
    "residual",
)
_WITH_SITE = ("layer", "rotation_back", "attention", "style", *ATTENTION_ROLES, *_OF_QUANTISED)


def site_problems(program: Program) -> list[str]:
    """What is wrong with the roles in the graph and the plan's entries; at most a few of each kind."""
    problems = [text for node in program.graph.nodes if (text := _role_problem(node))]
    if problems:
        return problems[:3]
    live = _live(program)
    if dead := [site for site, layer in program.sites() if layer not in live]:
        return [f"nothing reads site {dead[0]}"]
    names = Counter(site for site, _ in program.sites())
    if problems := [f"two layers are called {name}" for name, count in names.items() if count > 1]:
        return problems[:3]
    layers = dict(program.sites())
    planned = [plan.site for plan in program.plan.sites]
    if len(set(planned)) != len(planned):
        return ["the plan names a site twice"]
    for plan in program.plan.sites:
        if plan.site in layers:
            problems += [f"site {plan.site}: {text}" for text in _plan_problems(program, plan, layers[plan.site])]
    problems += [
        f"{node.name} ({role}) belongs to a site that the plan does not quantise"
        for node in program.graph.nodes
        if (role := node.meta.get("role")) in _OF_QUANTISED
        and not (node.meta["site"] in program.plan and program.plan[node.meta["site"]].quantised)
    ]
    return [*problems, *attention_problems(program), *style_problems(program)][:3]


def _live(program: Program) -> set[fx.Node]:
    """What the output depends on."""
    live: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if node.op == "output" or node in live:
            live.update(node.all_input_nodes)
    return live


def _role_problem(node: fx.Node) -> str:
    """A role is one of those that passes give, on one of the operators that it stands for, with its arguments."""
    role = node.meta.get("role")
    if role is None:
        return ""
    if role not in _ROLES or not is_op(node, *_ROLES[role]):
        return f"{node.name} ({node.target}) has the role {role!r}"
    if role in _WITH_SITE and not isinstance(node.meta.get("site"), str):
        return f"{node.name} is a {role} without a site"
    if role != "layer" and node.kwargs:
        return f"{node.name} is a {role} with arguments by name"
    if not all(isinstance(given, fx.Node) for given in node.args[: _operands(node)]):
        return f"{node.name} is a {role} of something besides values"
    if role == "layer" and (node.kwargs or len(node.args) < 2):
        return f"{node.name} is a layer with arguments by name"
    if is_op(node, _CONV) and not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in node.args[3:6]):
        return f"{node.name} is a layer whose stride, padding and dilation are no pairs"
    return ""


def _operands(node: fx.Node) -> int:
    """How many of the first arguments are values."""
    if is_op(node, _RESCALE, ops.softmax_quantize.default):
        return 3
    if is_op(node, *_OF_ONE_VALUE):
        return 1
    if is_op(node, ops.fake_quantize_residual.default):
        return 5
    if is_op(node, ops.fake_quantize_bounded.default, ops.quantize_bounded.default):
        return 4
    return 2


# ---- a site of the plan ----------------------------------------------------------------------------------------------


def _plan_problems(program: Program, plan: SitePlan, layer: fx.Node) -> Iterator[str]:
    kind = "linear" if is_op(layer, _LINEAR) or _is_linear_product(layer) else "conv2d"
    if plan.kind != kind:
        yield f"the plan says {plan.kind}; the graph has a {kind}"
    weight = _stored_shape(program, plan, layer)
    if weight is not None and weight[:2] != (plan.out_channels, plan.in_channels):
        yield f"the plan says {plan.in_channels} to {plan.out_channels} channels; its weight is {list(weight)}"
    if plan.block and plan.in_channels % plan.block:
        yield f"its block {plan.block} does not divide its {plan.in_channels} channels"
    if plan.lora_rank and (not plan.quantised or program.stage not in (Stage.QUANTISED, Stage.TRAINED)):
        yield "has a LoRA that no pass could have put there"
    yield from (text for check in (_smoothing_problem, _branch_problem) if (text := check(program, plan, layer)))
    if program.stage == Stage.CAPTURED:
        if _rotated_by(layer.args[0]) != (plan.hadamard, plan.weight_rotated):
            yield "the plan and the graph do not agree about its rotation"
        return
    if plan.weight_only:
        if problem := _table_problem(program, plan, layer):
            yield problem
        return
    if not plan.quantised:
        if is_op(layer, _RESCALE) or _has_role(layer.args[1], "weight_quantizer", "weight"):
            yield "the plan leaves it float; the graph does not"
        return
    yield from (
        _integer_problems(program, plan, layer)
        if program.stage == Stage.INTEGER
        else _training_problems(program, plan, layer)
    )


def _table_problem(program: Program, plan: SitePlan, layer: fx.Node) -> str:
    """What is wrong with a weight of a table beside a float activation."""
    weight: Any = layer.args[1]
    if _rotated_by(layer.args[0]) != (None, False) or is_op(layer, _RESCALE):
        return "the plan leaves its activation float; the graph does not"
    if program.stage != Stage.INTEGER:
        return "" if weight.op == "get_attr" else "its weight is not stored"
    names = [f"{plan.site}.weight_table", f"{plan.site}.weight_codes", f"{plan.site}.weight_packed"]
    if not is_op(weight, ops.lookup.default) or names[0] not in program.state:
        return "its weight is not looked up in a table"
    if not any(name in program.state for name in names[1:]):
        return "has no stored codes"
    entries = 2 ** (plan.weight_bits or 8)
    found = list(program.state[names[0]].shape)
    return "" if found == [plan.out_channels, entries] else f"its table is {found}; expected {entries} for each channel"


def _smoothing_problem(program: Program, plan: SitePlan, layer: fx.Node) -> str:
    """What is wrong with the factors in front of a site; binary codes have those of the site whose they are."""
    plan = replace(plan, site=main_site(plan.site))
    node = source_of(layer, through_smoothing=False)
    if plan.smoothed != _of_site(node, plan, "smoothing") or _has_role(node, "smoothing") != plan.smoothed:
        return "the plan and the graph do not agree about its smoothing"
    if not plan.smoothed:
        return ""
    name: Any = node.args[1]
    shape = (plan.in_channels, 1, 1) if plan.kind == "conv2d" else (plan.in_channels,)
    if name.op != "get_attr" or name.target != f"{plan.site}.smoothing":
        return "its smoothing is not stored"
    found = tuple(program.state[name.target].shape) if name.target in program.state else None
    if found != shape:
        return f"its smoothing is {found}; expected {shape}"
    return _shift_problem(program, plan, layer, node.args[0], shape)


def _shift_problem(program: Program, plan: SitePlan, layer: fx.Node, node: Any, shape: tuple[int, ...]) -> str:
    """What is wrong with the shifts in front of a site's smoothing, and with the bias that takes them back."""
    if _of_site(node, plan, "shift") != plan.shifted:
        return "the plan and the graph do not agree about its shift"
    if not plan.shifted:
        return ""
    shift, bias = node.args[1], layer.args[3 if is_op(layer, _RESCALE) else 2] if len(layer.args) > 2 else None
    wanted = {f"{plan.site}.shift": (shift, shape), f"{plan.site}.bias_shifted": (bias, (plan.out_channels,))}
    for name, (stored, size) in wanted.items():
        if not isinstance(stored, fx.Node) or stored.op != "get_attr" or stored.target != name:
            return f"its {name.removeprefix(plan.site + '.')} is not stored"
        found = tuple(program.state[name].shape) if name in program.state else None
        if found != size:
            return f"its {name.removeprefix(plan.site + '.')} is {found}; expected {size}"
    return ""


def _branch_problem(program: Program, plan: SitePlan, layer: fx.Node) -> str:
    """What is wrong with the float branch beside a site."""
    total, layer = output_of(layer), with_residual(layer)
    if (total is not layer) != bool(plan.branch_rank):
        return "the plan and the graph do not agree about its branch"
    if total is layer:
        return ""
    up: Any = total.args[1]
    if not _of_site(total, plan, "branch") or total.args[0] is not layer or list(layer.users) != [total]:
        return "its branch is not all that is added to it"
    if not _has_role(up, "branch_up") or not _has_role(up.args[0], "branch_down"):
        return "its branch is not two layers"
    down: Any = up.args[0]
    if down.args[0] is not source_of(layer, through_smoothing=False):
        return "its branch reads something else than it does"
    shapes = []
    for name, node in (("branch_down", down.args[1]), ("branch_up", up.args[1])):
        if node.op != "get_attr" or node.target != f"{plan.site}.{name}" or node.target not in program.state:
            return f"its {name} is not stored"
        shapes.append(tuple(program.state[node.target].shape))
    wanted = ((plan.branch_rank, plan.in_channels), (plan.out_channels, plan.branch_rank))
    return "" if (shapes[0][:2], shapes[1][:2]) == wanted else f"its branch is not of rank {plan.branch_rank}"


def _is_linear_product(layer: fx.Node) -> bool:
    """Whether an integer layer's accumulator has its channels last."""
    return is_op(layer, _RESCALE) and len(layer.args) > 4 and bool(layer.args[4] == -1)


def _stored_shape(program: Program, plan: SitePlan, layer: fx.Node) -> tuple[int, ...] | None:
    weight: Any = layer.args[1]
    if is_op(layer, _RESCALE):
        codes = program.state.get(f"{plan.site}.weight_codes")
        return None if codes is None else tuple(codes.shape)
    shape = (
        tuple(weight.meta.get("shape", ()))
        if weight.op != "get_attr"
        else tuple(program.state[str(weight.target)].shape)
    )
    return shape if len(shape) >= 2 else None


def _has_role(node: Any, *roles: str) -> bool:
    return isinstance(node, fx.Node) and node.meta.get("role") in roles


def _of_site(node: Any, plan: SitePlan, *roles: str) -> bool:
    """Whether a node has a role at a site, or at the one whose binary codes it holds."""
    return _has_role(node, *roles) and node.meta.get("site") in (plan.site, main_site(plan.site))


def _rotated_by(x: Any) -> tuple[Rotation | None, bool]:
    """By what a captured layer's input is rotated, and whether its weight has to be too: x is not rotated back."""
    if not _has_role(x, "rotation", "rotation_back"):
        return None, False
    return rotation_of(x), _has_role(x, "rotation")


def _rotated(plan: SitePlan, layer: fx.Node) -> tuple[Any, str]:
    """What stands in front of a layer's rotation back, and what is wrong with that rotation."""
    x: Any = layer.args[0]
    if not plan.block or plan.weight_rotated:
        return x, "is rotated back; the plan says nothing of it" if _has_role(x, "rotation_back") else ""
    if not _of_site(x, plan, "rotation_back") or rotation_of(x) != plan.hadamard:
        return x, f"lacks its rotation back in {plan.rotation} blocks of {plan.block}"
    return x.args[0], ""


def _rotation_problem(plan: SitePlan, quantiser: Any) -> str:
    """What is wrong with what a site's quantiser reads: rotated as the plan says, or not at all."""
    x = quantiser.args[0]
    if plan.block and not _has_role(x, "rotation"):
        return f"is not rotated in {plan.rotation} blocks of {plan.block} before its quantiser"
    found = rotation_of(x) if _has_role(x, "rotation") else None
    return "" if found == plan.hadamard else f"is rotated by {found}; the plan says {plan.hadamard or 'nothing of it'}"


def _training_problems(program: Program, plan: SitePlan, layer: fx.Node) -> Iterator[str]:
    real, problem = _rotated(plan, layer)
    weight: Any = layer.args[1]
    if problem:
        yield problem
    elif not _of_site(real, plan, "activation_quantizer") or not _of_site(weight, plan, "weight_quantizer"):
        yield "lacks one of its quantisers"
    elif problem := _rotation_problem(plan, real):
        yield problem
    elif not activation_codes_fit(program, plan, real):
        yield f"its activation's codes are not those of {plan.activation_bits} bits"
    elif problem := weight_codes_problem(program, plan, weight) or group_problem(program, plan, real, weight):
        yield problem
    elif not plan.activation_group and f"{plan.site}.activation_scale_table" not in program.state:
        yield "has no table of scales"
    elif missing := [name for name in _zero_points(plan) if name not in program.state]:
        yield f"has no {missing[0].removeprefix(plan.site + '.')}"
    elif weight.args[1].op != "get_attr":
        yield "its weight's scale is computed"
    elif bool(plan.lora_rank) != _of_site(weight.args[0], plan, "lora"):
        yield "the plan and the graph do not agree about its LoRA"
    else:
        stored = weight.args[0].args[0] if plan.lora_rank else weight.args[0]
        parts = [f"{plan.site}.lora_a", f"{plan.site}.lora_b"] if plan.lora_rank else []
        if stored.op != "get_attr" or any(part not in program.state for part in parts):
            yield "its weight is not stored"
        elif plan.lora_rank and program.state[parts[0]].shape[-2:][0] != plan.lora_rank:
            yield f"its LoRA has another rank than {plan.lora_rank}"


def _zero_points(plan: SitePlan) -> list[str]:
    """What calibration and training find the zero points and the tops of ranges by."""
    kinds = {
        "weight_zero": not plan.weight_symmetric,
        "activation_zero_table": not plan.activation_symmetric,
        "weight_top": plan.weight_mixed,
        "weight_salient": plan.weight_residual,
    }
    return [f"{plan.site}.{name}" for name, has in kinds.items() if has]


def _integer_problems(program: Program, plan: SitePlan, layer: fx.Node) -> Iterator[str]:
    names = [f"{plan.site}.weight_codes", f"{plan.site}.weight_packed"]
    back = None if plan.weight_rotated else plan.hadamard
    if not any(name in program.state for name in names):
        yield "has no stored codes"
    elif is_op(layer, _RESCALE) and plan.grouped:
        yield "the plan says that its scales are of groups; the graph has an integer product"
    elif is_op(layer, _RESCALE):
        products = list(_products(layer.args[0]))
        if not products or not all(_of_site(product, plan, "product") for product in products):
            yield "rescales something besides its own products"
        elif not all(_has_role(product.args[0], "codes") for product in products):
            yield "multiplies something besides codes"
        elif not all(activation_codes_fit(program, plan, product.args[0]) for product in products):
            yield f"its activation's codes are not those of {plan.activation_bits} bits"
        elif problem := _rotation_problem(plan, products[0].args[0]):
            yield problem
        elif any(rotation_within(product.args[1]) != back for product in products):
            yield f"its codes are rotated otherwise than by {back or 'nothing'}"
    else:
        real, problem = _rotated(plan, layer)
        if problem:
            yield problem
        elif not _has_role(real, "activation") or not _has_role(real.args[0], "codes"):
            yield "lacks its quantiser"
        elif not activation_codes_fit(program, plan, real.args[0]):
            yield f"its activation's codes are not those of {plan.activation_bits} bits"
        elif problem := _rotation_problem(plan, real.args[0]):
            yield problem
        elif not _of_site(layer.args[1], plan, "weight"):
            yield "its weight is not made of its codes"
        elif problem := group_problem(program, plan, real.args[0], layer.args[1]):
            yield problem


def _products(accumulator: Any) -> Iterator[Any]:
    """One product, or the two that a sum adds, the second perhaps times a number."""
    if is_op(accumulator, *_PRODUCTS):
        yield accumulator
    elif is_op(accumulator, aten.add.Tensor):
        for part in accumulator.args[:2]:
            yield part.args[0] if is_op(part, aten.mul.Scalar) else part
