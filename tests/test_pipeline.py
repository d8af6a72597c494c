"""Pipelines as text, and the runner: what it checks, records and refuses."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hqc.errors import PassError, PipelineTextError, PlanError
from hqc.passes import (
    PASSES,
    AttachLora,
    FreezeIntegers,
    InsertHadamard,
    InsertQdq,
    MergeLora,
    PackInt4,
    RotateWeights,
    SelectLayers,
    SplitDigits,
)
from hqc.pipeline import Findings, Pass, format_pipeline, parse_pipeline, run_pass, run_pipeline
from hqc.program import Program, Stage, copy_graph

relaxed = settings(deadline=None, derandomize=True, max_examples=150)
finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(max_size=12)

PASS_VALUES = st.one_of(
    st.builds(SelectLayers, bits=text, rules=text, keep_float=st.lists(text, max_size=3).map(tuple)),
    st.builds(InsertHadamard, block=st.sampled_from([8, 16, 32, 64, 128]), tokens=st.booleans()),
    st.builds(InsertQdq, timesteps=st.lists(finite, min_size=1, max_size=4, unique=True).map(tuple)),
    st.builds(AttachLora, rank=st.integers(1, 10**6), seed=st.integers(-(2**40), 2**40)),
    *(st.just(kind()) for kind in (MergeLora, FreezeIntegers, RotateWeights, SplitDigits, PackInt4)),
)


@relaxed
@given(st.lists(PASS_VALUES, max_size=5))
def test_text_round_trip(passes: list[Pass]) -> None:
    printed = format_pipeline(passes)
    parsed = parse_pipeline(printed, PASSES)
    assert parsed == tuple(passes)
    assert format_pipeline(parsed) == printed


def test_only_options_that_differ_are_printed() -> None:
    passes = [SelectLayers(), InsertHadamard(tokens=False), InsertQdq((1.0, 2.5)), AttachLora(rank=8)]
    assert format_pipeline(passes) == (
        "select_layers(), insert_hadamard(tokens=False), insert_qdq(timesteps=(1.0, 2.5)), attach_lora(rank=8)"
    )


def test_lists_and_whole_numbers_are_taken() -> None:
    assert parse_pipeline("insert_qdq(timesteps=[1, 2])", PASSES) == (InsertQdq((1, 2)),)
    assert parse_pipeline("\n insert_hadamard( block = 8 ) ,\n merge_lora(),", PASSES) == (
        InsertHadamard(8),
        MergeLora(),
    )
    assert parse_pipeline("", PASSES) == ()


HOSTILE = {
    "__import__('os').system('true')": "is not name(option=value)",
    "__import__('os')": "is not name(option=value)",
    "eval(x=1)": "unknown step 'eval'; there are merge_style, drop_single_key_attention, open_attention",
    "merge_lora": "is not name(option=value)",
    "merge_lora()()": "is not name(option=value)",
    "hqc.merge_lora()": "is not name(option=value)",
    "insert_hadamard(8)": "is not name(option=value)",
    "insert_hadamard(*[8])": "is not name(option=value)",
    "insert_hadamard(**{'block': 8})": "has no option None; it has block, tokens",
    "insert_hadamard(size=8)": "has no option 'size'; it has block, tokens",
    "insert_hadamard(takes=())": "has no option 'takes'; it has block, tokens",
    "insert_hadamard(block=8, block=16)": "gives option block twice",
    "insert_hadamard(block=print(1))": "option block is not a literal",
    "insert_hadamard(block=[].append)": "option block is not a literal",
    "insert_hadamard(block=2**5)": "option block is not a literal",
    "insert_hadamard(block={[]: 1})": "option block is not a literal",
    "insert_hadamard(block=f'{1}')": "option block is not a literal",
    "insert_hadamard(block='32')": "option block is a str; expected int",
    "insert_hadamard(block=True)": "option block is a bool; expected int",
    "insert_hadamard(tokens=1)": "option tokens is a int; expected bool",
    "insert_hadamard(block=None)": "option block is a NoneType; expected int",
    "select_layers(keep_float='conv_in')": "option keep_float is a str; expected tuple",
    "select_layers(bits=4)": "option bits is a int; expected str",
    "insert_qdq(timesteps=5)": "option timesteps is a int; expected tuple",
    "merge_lora(), *rotate_weights()": "is not name(option=value)",
    "x for x in y": "is not a list of steps",
    "merge_lora()], [merge_lora()": "is not a list of steps",
    "merge_lora(": "cannot be parsed",
    "merge_lora() merge_lora()": "cannot be parsed",
    "merge_lora()\0": "cannot be parsed",
    "(" * 5000: "cannot be parsed",
    "lambda: 0": "is not name(option=value)",
    "(y := merge_lora())": "is not name(option=value)",
    "'a'": "is not name(option=value)",
}


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda h: h[:32])
def test_hostile_text_is_refused_with_its_reason(hostile: str) -> None:
    with pytest.raises(PipelineTextError) as caught:
        parse_pipeline(hostile, PASSES)
    assert HOSTILE[hostile] in caught.value.found
    assert len(str(caught.value)) < 500, "the message repeats the whole input"


@pytest.mark.parametrize("depth", [100, 900, 3000, 20_000])
@pytest.mark.parametrize(
    "shape", ["insert_hadamard(block={n}1)", "{n}1", "merge_lora() + {n}1", "insert_hadamard(block={p}1{q})"]
)
def test_deep_text_is_refused(shape: str, depth: int) -> None:
    with pytest.raises(PipelineTextError):
        parse_pipeline(shape.format(n="-" * depth, p="[" * depth, q="]" * depth), PASSES)


@pytest.mark.parametrize("depth", [1000, 5000, 50_000])
def test_long_sums_are_refused(depth: int) -> None:
    with pytest.raises(PipelineTextError):
        parse_pipeline("1+" * depth + "1", PASSES)


@relaxed
@given(st.text(max_size=60))
def test_any_text_gives_passes_or_the_one_error(anything: str) -> None:
    with contextlib.suppress(PipelineTextError, PlanError):  # any other error fails the test
        parse_pipeline(anything, PASSES)


# ---- the runner ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """A pass whose promise or product can be broken by an option."""

    how: str = ""

    takes: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "numerics"

    def find(self, program: Program) -> Findings:
        return Findings(("conv",), (("head", "not this one"),))

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        graph, state = copy_graph(program.graph), dict(program.state)
        if self.how == "numerics":
            state["conv.bias"] = state["conv.bias"] + 1
        if self.how == "nan":
            state["conv.bias"] = state["conv.bias"] * float("nan")
        if self.how == "weight":
            del state["conv.bias"]
        if self.how == "shape":
            state["conv.bias"] = state["conv.bias"][:3]
        if self.how == "operator":
            node = next(n for n in graph.nodes if n.op == "call_function")
            with graph.inserting_after(node):
                graph.call_function(torch.ops.hqc.digit.default, (node, 0))
        if self.how == "foreign":
            node = next(n for n in graph.nodes if n.op == "call_function")
            with graph.inserting_after(node):
                graph.call_function(print, (node,))
        if self.how == "order":
            nodes = [n for n in graph.nodes if n.op == "call_function"]
            nodes[0].append(nodes[-1]) if nodes[0] in nodes[-1].args else nodes[-1].append(nodes[0])
        if self.how == "plan":
            selected = SelectLayers().apply(program, ("conv",)).plan
            return program.evolve(plan=replace(selected, sites=(replace(selected.sites[0], site="gone"),)))
        return program.evolve(graph=graph, state=state)


def test_the_runner_records_what_it_did(captured: Callable[[str], Program]) -> None:
    result = run_pass(captured("two_sites"), Broken())
    (record,) = result.history
    assert (record.text, record.touched, record.missed) == ("broken()", ("conv",), (("head", "not this one"),))
    assert record.seconds >= 0
    assert str(record).splitlines()[1] == "  missed head: not this one"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("weight", "weight conv.bias is missing"),
        ("shape", "weight conv.bias is [3]; the graph says [16]"),
        ("operator", "(hqc.digit.default) does not belong in a program that is captured"),
        ("foreign", "calls <built-in function print>"),
        ("order", "the graph is malformed"),
        ("plan", "the plan names gone, which the graph lacks"),
    ],
)
def test_the_runner_verifies_the_result(how: str, reason: str, captured: Callable[[str], Program]) -> None:
    with pytest.raises(PassError) as caught:
        run_pass(captured("two_sites"), Broken(how))
    assert reason in caught.value.found
    assert caught.value.where == f"broken(how='{how}')"
    assert caught.value.do == "Report a bug: a pass broke its contract."


@pytest.mark.parametrize("how", ["numerics", "nan"])
def test_the_runner_checks_the_promise_about_numerics(how: str, captured: Callable[[str], Program]) -> None:
    run_pass(captured("two_sites"), Broken(how))  # not asked to check: not checked
    with pytest.raises(PassError, match=r"changed the output by .* relative; it promises not to"):
        run_pass(captured("two_sites"), Broken(how), check_numerics=True)


def test_passes_run_in_the_order_given(captured: Callable[[str], Program]) -> None:
    with pytest.raises(PassError, match=r"freeze_integers.* takes a program that is quantised or trained"):
        run_pipeline(captured("two_sites"), [SelectLayers(), FreezeIntegers(), InsertQdq()])
