"""The value itself: frozen, its module, its inputs, its text."""

import dataclasses
import doctest
import importlib
from collections.abc import Callable

import pytest
import torch
from zoo import ZOO

from hqc.program import InputSpec, PassRecord, Program, copy_graph, is_op
from hqc.text import graph_text


@pytest.mark.parametrize("field", ["graph", "state", "stage", "plan", "history", "inputs", "origin"])
def test_fields_cannot_be_set(field: str, captured: Callable[[str], Program]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(captured("two_sites"), field, None)


@pytest.mark.parametrize("model", ZOO)
def test_a_copied_graph_is_the_same_text_and_another_object(model: str, captured: Callable[[str], Program]) -> None:
    program = captured(model)
    copy = copy_graph(program.graph)
    assert graph_text(program.evolve(graph=copy)) == graph_text(program)
    originals = set(program.graph.nodes)
    assert not originals & set(copy.nodes)
    assert not [n for n in copy.nodes for used in n.all_input_nodes if used in originals]
    for node in copy.nodes:
        node.meta["site"] = "changed"
    assert "changed" not in graph_text(program)


def test_names_stay_unique_when_a_copy_grows(captured: Callable[[str], Program]) -> None:
    copy = copy_graph(captured("unconditional").graph)
    names = [n.name for n in copy.nodes]
    node = next(n for n in copy.nodes if n.op == "call_function")
    with copy.inserting_after(node):
        for name in names:
            copy.create_node("call_function", torch.ops.aten.neg.default, (node,), name=name)
    names = [n.name for n in copy.nodes]
    assert len(names) == len(set(names))
    copy.lint()


def test_the_module_shares_the_weights_and_has_no_gradient(captured: Callable[[str], Program]) -> None:
    program = captured("two_sites")
    module = program.module()
    parameters = dict(module.named_parameters())
    assert parameters.keys() == program.state.keys()
    assert all(parameters[name].data_ptr() == program.state[name].data_ptr() for name in parameters)
    assert not any(p.requires_grad for p in parameters.values())


def test_example_inputs_are_fixed_and_timesteps_differ(captured: Callable[[str], Program]) -> None:
    program = captured("cross_attention")
    one, again, other = (program.example_inputs(8, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert [tuple(a.shape) for a in one] == [(8, 3, 8, 8), (8,), (8, 2, 32)]
    assert one[1].unique().numel() == 8
    assert one[1].min() >= 0
    assert one[1].max() < 1000


def test_size_in_bytes_counts_every_tensor() -> None:
    program = Program(torch.fx.Graph(), {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.int8)}, ())
    assert program.size_bytes() == 3 * 5 * 4 + 7


def test_a_record_prints_its_misses() -> None:
    record = PassRecord("merge_lora()", ("a", "b"), (("c", "has no LoRA"),), 0.126)
    assert str(record) == "merge_lora(): 2 sites, 1 missed, 0.13 s\n  missed c: has no LoRA"
    dropped = PassRecord("drop()", ("a",), (), 0.1, ("a.to_q", "a.to_k"))
    assert str(dropped) == "drop(): 1 sites, 0 missed, 2 removed, 0.10 s\n  removed a.to_q\n  removed a.to_k"


def test_is_op(captured: Callable[[str], Program]) -> None:
    nodes = {n.name: n for n in captured("two_sites").graph.nodes}
    conv, linear = torch.ops.aten.conv2d.default, torch.ops.aten.linear.default
    assert is_op(nodes["conv2d"], linear, conv)
    assert not is_op(nodes["conv2d"], linear)
    assert not is_op(nodes["sample"], conv)
    assert not is_op(5, conv)
    assert not is_op(None, conv)


def test_the_text_of_a_graph(captured: Callable[[str], Program]) -> None:
    text = graph_text(captured("two_sites"))
    lines = text.splitlines()
    assert text.endswith("\n")
    assert len(lines) == len(list(captured("two_sites").graph.nodes))
    assert "%sample: float32[N, 32, 4, 4] = placeholder()" in lines
    assert "%conv_weight: float32[16, 32, 3, 3] = get_attr(conv.weight)" in lines
    assert lines[-1] == "return %linear"


def test_the_text_shows_python_functions_and_types() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
    twice = graph.call_function(__import__("operator").mul, (size, 2))
    cast = graph.call_function(torch.ops.aten.to.dtype, (x, torch.int8), {"copy": True})
    graph.output(graph.call_function(torch.ops.aten.view.default, (cast, [twice, -1])))
    assert graph_text(Program(graph, {}, (InputSpec("x", ("N", 2)),))) == (
        "%x = placeholder()\n"
        "%sym_size_int = aten.sym_size.int(%x, 0)\n"
        "%mul = operator.mul(%sym_size_int, 2)\n"
        "%to_dtype = aten.to.dtype(%x, torch.int8, copy=True)\n"
        "%view_default = aten.view.default(%to_dtype, [%mul, -1])\n"
        "return %view_default\n"
    )


@pytest.mark.parametrize(
    "module", ["hqc.bits", "hqc.plan", "hqc.rotations", "hqc.site_names", "hqc.passes.split_digits"]
)
def test_examples_in_docstrings(module: str) -> None:
    outcome = doctest.testmod(importlib.import_module(module))
    assert outcome.attempted > 0
    assert outcome.failed == 0
