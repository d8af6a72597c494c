"""Attention over one key: what is left of it, that the numbers stay, and where it is left alone."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import captured_denoiser, source_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional
from zoo import ZOO, fingerprint

import hqc
from hqc.capture import capture_module, trace
from hqc.capture.source import Source
from hqc.errors import PlanError
from hqc.export import export_program
from hqc.passes import DropSingleKeyAttention, SelectLayers
from hqc.pipeline import run_pass
from hqc.program import InputSpec, Program, aten, copy_graph, is_op
from hqc.recipes import find_recipe
from hqc.recipes.run import Request, planned
from hqc.runtimes import load
from hqc.sampling import synthetic_task
from hqc.storage import load_program, save_program
from hqc.text import graph_text

Captured = Callable[[str], Program]
DROP = DropSingleKeyAttention()
ROUNDING = 1e-6  # sums of at most 64 terms in another order, through at most 40 layers
ATTENTION = aten.scaled_dot_product_attention.default


def dropped(program: Program) -> Program:
    """With the pass's own check, and true shapes."""
    result = run_pass(program, DROP, check_numerics=True)
    with torch.no_grad():
        _Shapes(result.module()).run(*result.example_inputs(3))
    return result


class _Shapes(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op == "call_function" and "shape" in n.meta:
            assert [eval(str(d), {"N": 3}) for d in n.meta["shape"]] == list(value.shape), n.format_node()
            assert n.meta["dtype"] == str(value.dtype).removeprefix("torch."), n.format_node()
        return value


def error(one: Program, other: Program, batch: int) -> float:
    args = one.example_inputs(batch, seed=batch)
    with torch.no_grad():
        wanted, found = one.module()(*args), other.module()(*args)
    return float((found - wanted).norm() / wanted.norm())


def count(program: Program, *targets: Any) -> int:
    return sum(is_op(node, *targets) for node in program.graph.nodes)


# ---- denoisers -----------------------------------------------------------------------------------------------------


def of_one_token(source: Source) -> Source:
    """The same denoiser for a context of one token."""
    inputs = tuple(replace(s, shape=("N", 1, s.shape[2])) if len(s.shape) == 3 else s for s in source.inputs)
    return replace(source, inputs=inputs)


@cache
def one_token_unet() -> Program:
    return trace(of_one_token(ZOO["cross_attention"]()))


# cross_attention is sd15 and inpainting at other widths: convolutions as projections, the same attention; the layers
# of sdxl are those of sd21.
@pytest.mark.parametrize("name", ["cross_attention", pytest.param("sd21", marks=pytest.mark.long), "sdxl"])
def test_every_cross_attention_of_a_unet_goes(name: str) -> None:
    program = one_token_unet() if name == "cross_attention" else trace(of_one_token(source_of(name)))
    result = dropped(program)
    sites = [site for site, _ in program.sites()]
    blocks = [site.removesuffix(".to_v") for site in sites if site.endswith("attn2.to_v")]
    record = result.history[-1]
    assert blocks
    assert record.touched == tuple(blocks)
    assert {block for block, _ in record.missed} == {block.replace("attn2", "attn1") for block in blocks}
    assert set(record.removed) == {f"{block}.{layer}" for block in blocks for layer in ("to_q", "to_k")}
    assert [site for site, _ in result.sites()] == [site for site in sites if site not in record.removed]
    assert count(result, ATTENTION) == count(program, ATTENTION) - len(blocks)
    assert count(result, aten.expand.default) == count(program, aten.expand.default)
    # norm; two projections, views and transpositions; the attention itself
    assert len(program.graph.nodes) - len(result.graph.nodes) >= 8 * len(blocks)
    layers = dict(result.sites())
    assert {tuple(layers[f"{block}.to_out.0"].meta["shape"][:2]) for block in blocks} == {("N", 1)}
    assert error(program, result, 1) <= ROUNDING
    assert error(program, result, 3) <= ROUNDING


@pytest.mark.parametrize("name", ["cross_attention", "unconditional", "shared_input", "two_sites"])
def test_it_does_not_fire_without_a_single_key(captured: Captured, name: str) -> None:
    program = captured(name)
    findings = DROP.find(program)
    assert findings.matches == ()
    assert len(findings.misses) == count(program, ATTENTION)
    assert DROP.apply(program, ()) is program
    assert graph_text(run_pass(program, DROP)) == graph_text(program)
    assert run_pass(program, DROP).history[-1].removed == ()


@pytest.mark.parametrize("name", ["pixart", "sd3", pytest.param("flux", marks=pytest.mark.long)])
def test_transformers_keep_their_attention(name: str) -> None:
    findings = DROP.find(captured_denoiser(name))
    assert findings.matches == ()
    assert findings.misses


def test_running_again_does_nothing(captured: Captured) -> None:
    once = run_pass(captured("single_key"), DROP)
    assert DROP.find(once).matches == DROP.find(once).misses == ()
    assert graph_text(run_pass(once, DROP)) == graph_text(once)


# ---- shapes --------------------------------------------------------------------------------------------------------

KEYS = 24


class Attention(nn.Module):
    """Cross-attention over one token with a choice of what follows it."""

    def __init__(self, heads: int, after: str) -> None:
        super().__init__()
        self.heads, self.after = heads, after
        self.to_q, self.to_k, self.to_v = nn.Linear(8, KEYS), nn.Linear(6, KEYS), nn.Linear(6, KEYS)
        self.to_out, self.rows = nn.Linear(KEYS, 8), nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        tokens = sample + (timestep / 1000).view(-1, 1, 1)
        n, size = sample.shape[0], KEYS // self.heads
        q, k, v = self.to_q(tokens), self.to_k(condition), self.to_v(condition)
        q, k, v = (x.view(n, -1, self.heads, size).transpose(1, 2) for x in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return getattr(self, self.after)(tokens, mixed, n)

    def residual(self, tokens: Tensor, mixed: Tensor, n: int) -> Tensor:
        return tokens + self.to_out(mixed.transpose(1, 2).reshape(n, -1, KEYS))

    def permuted(self, tokens: Tensor, mixed: Tensor, n: int) -> Tensor:
        mixed = mixed.permute(0, 2, 1, 3).contiguous().view(n, mixed.shape[2], KEYS)
        return self.to_out(functional.dropout(mixed, 0.5, training=False) * 2.0 - 1) - tokens

    def gated(self, tokens: Tensor, mixed: Tensor, n: int) -> Tensor:
        found = self.to_out(mixed.transpose(1, 2).reshape(n, -1, KEYS))
        return (found * found * tokens.mean(1, keepdim=True) + found).to(torch.float32) + tokens

    def output(self, tokens: Tensor, mixed: Tensor, n: int) -> Tensor:
        return mixed

    def mixing(self, tokens: Tensor, mixed: Tensor, n: int) -> Tensor:
        """Two readers: a softmax over tokens, and the residual addition."""
        found = mixed.transpose(1, 2).reshape(n, -1, KEYS)
        return self.to_out(found) + tokens + found.cumsum(1).softmax(1)[..., :8]

    def across(self, tokens: Tensor, mixed: Tensor, n: int) -> Tensor:
        """A linear layer over the token axis."""
        return self.rows(mixed.transpose(2, 3))

    def merged(self, tokens: Tensor, mixed: Tensor, n: int) -> Tensor:
        """A reshape that merges tokens with channels."""
        return mixed.transpose(1, 2).reshape(n, -1) * 1.5

    def concatenated(self, tokens: Tensor, mixed: Tensor, n: int) -> Tensor:
        return torch.cat([tokens, self.to_out(mixed.transpose(1, 2).reshape(n, -1, KEYS))], 2)


def attention(after: str, heads: int = 2, tokens: int = 4) -> Program:
    torch.manual_seed(heads)
    inputs = (InputSpec("sample", ("N", tokens, 8)), InputSpec("timestep", ("N",)), InputSpec("condition", ("N", 1, 6)))
    return capture_module(Attention(heads, after), inputs)


SINKS = ("residual", "permuted", "gated")
STOPS = ("output", "mixing", "across", "merged", "concatenated")


@pytest.mark.parametrize("after", [*SINKS, *STOPS])
def test_the_broadcast_sinks_as_far_as_it_may(after: str) -> None:
    program = attention(after)
    result = dropped(program)
    assert count(result, ATTENTION) == 0
    assert {"to_q", "to_k"} == set(result.history[-1].removed)
    assert count(result, aten.expand.default) - count(program, aten.expand.default) == (after in STOPS)
    assert error(program, result, 1) <= ROUNDING
    assert error(program, result, 3) <= ROUNDING


@settings(max_examples=6, deadline=None)
@given(st.sampled_from((1, 2, 3, 4, 6, 24)), st.integers(1, 9), st.sampled_from(SINKS))
def test_any_heads_and_tokens(heads: int, tokens: int, after: str) -> None:
    program = attention(after, heads, tokens)
    result = dropped(program)
    assert count(result, ATTENTION) == 0
    assert error(program, result, 2) <= ROUNDING


def test_only_the_attentions_asked_for_go() -> None:
    program = one_token_unet()
    one = DROP.find(program).matches[0]
    result = DROP.apply(program, (one,))
    assert count(result, ATTENTION) == count(program, ATTENTION) - 1
    assert error(program, result, 2) <= ROUNDING


# ---- misses --------------------------------------------------------------------------------------------------------


def changed(
    program: Program, *args: Any, shapes: Mapping[int, tuple[Any, ...]] | None = None, **kwargs: Any
) -> Program:
    """The attention with further arguments, or with other recorded shapes of query, key and value."""
    graph = copy_graph(program.graph)
    (node,) = (n for n in graph.nodes if is_op(n, ATTENTION))
    for index, shape in (shapes or {}).items():
        node.args[index].meta = {**node.args[index].meta, "shape": shape}  # type: ignore[union-attr]
    node.args, node.kwargs = (*node.args, *args), kwargs
    return program.evolve(graph=graph)


MISSES: Mapping[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "mask": ((torch.zeros(1),), {}, "it has a mask"),
    "dropout": ((None, 0.1), {}, "it drops out at random"),
    "causal": ((), {"is_causal": True}, "it is causal"),
    "grouped": ((), {"enable_gqa": True}, "its heads share keys"),
    "unknown": ((), {"window": 3}, "argument window is not known"),
    "many": ((), {"shapes": {1: ("N", 2, 7, 16)}}, "attention over 7 keys"),
    "keys": ((), {"shapes": {1: ("N", 2, "L", 16)}}, "the number of its keys is not known before it runs"),
    "queries": ((), {"shapes": {0: ("N", 2, "L", 16)}}, "the number of its queries is not known before it runs"),
    "batch": (
        (),
        {"shapes": {2: (1, 2, 1, 16)}},
        "its value [1, 2, 1, 16] does not fit its result ['N', 2, 16, 16]: only the tokens may be broadcast",
    ),
}


@pytest.mark.parametrize("name", MISSES)
def test_misses_say_why(captured: Captured, name: str) -> None:
    args, kwargs, reason = MISSES[name]
    findings = DROP.find(changed(captured("single_key"), *args, **kwargs))
    assert findings.matches == ()
    assert findings.misses == (("scaled_dot_product_attention", reason),)


@pytest.mark.parametrize("kwargs", [{}, {"scale": 0.5}, {"is_causal": False}, {"enable_gqa": False}], ids=str)
def test_arguments_that_do_not_matter(captured: Captured, kwargs: dict[str, Any]) -> None:
    program = changed(captured("single_key"), None, 0.0, **kwargs)
    assert DROP.find(program).matches == ("scaled_dot_product_attention",)
    assert error(program, dropped(program), 2) <= ROUNDING


# ---- what users see ------------------------------------------------------------------------------------------------


def test_the_record_lists_what_went(captured: Captured, tmp_path: Path) -> None:
    result = run_pass(captured("single_key"), DROP)
    record = result.history[-1]
    assert str(record).splitlines()[1:] == ["  removed to_q", "  removed to_k"]
    save_program(result, tmp_path / "p.hqc")
    assert load_program(tmp_path / "p.hqc").history[-1] == record


def test_keep_float_of_a_site_that_went_says_so(captured: Captured) -> None:
    program = captured("single_key")
    with pytest.raises(PlanError) as caught:
        planned(program, find_recipe("rtn"), Request("w4a4", ("*to_q",)))
    assert str(caught.value) == (
        "pattern '*to_q': matches no site that is left: drop_single_key_attention removed to_q. "
        "Nothing of it is quantised: leave the pattern out."
    )
    with pytest.raises(PlanError, match=r"pattern 'to_x': matches no site\. Sites are named like to_v"):
        planned(program, find_recipe("rtn"), Request("w4a4", ("to_x",)))
    plan = planned(program, find_recipe("rtn"), Request("w4a4", ("to_*",))).plan
    assert [p.site for p in plan.sites if not p.quantised] == ["to_v", "to_out"]


def test_the_sites_that_went_are_not_in_the_plan(captured: Captured) -> None:
    program = captured("single_key")
    before = fingerprint(program)
    plan = planned(program, find_recipe("hq-dm"), Request("w4a4")).plan
    assert [p.site for p in plan.sites] == ["to_v", "to_out", "head"]
    assert [p.site for p in run_pass(program, SelectLayers()).plan.sites][:2] == ["to_q", "to_k"]
    assert fingerprint(program) == before


# ---- the whole way -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> tuple[Program, Program]:
    """A UNet whose context is one token, and what `hqc ptq` makes of it."""
    program, few = one_token_unet(), {"sampler.num_inference_steps": 3, "calibrate_activations.samples": 2}
    return program, hqc.ptq(program, "rtn", "w4a4", hadamard=True, task=synthetic_task(program), settings=few)


@pytest.mark.parametrize("one_timestep", [False, True])
def test_ptq_and_export_agree_with_torch(pair: tuple[Program, Program], tmp_path: Path, one_timestep: bool) -> None:
    program, student = pair
    assert not [p.site for p in student.plan.sites if p.site.endswith(("attn2.to_q", "attn2.to_k"))]
    report = export_program(student, "onnxruntime", tmp_path / "x", float_program=program, one_timestep=one_timestep)
    assert len(report.verification.sites) == len(student.plan.quantised)
    assert report.verification.network.forced_error <= 2e-6
    sample, timestep, condition = student.example_inputs(12)  # of which most hold no code that flips on any CPU
    timestep = torch.full_like(timestep, 500.0)
    found = load(tmp_path / "x").session(sample, timestep, condition)
    with torch.no_grad():
        wanted, plain = (p.module()(sample, timestep, condition) for p in (student, program))
    quantisation = (wanted - plain).norm()
    assert (found - wanted).norm() <= 0.2 * quantisation  # a code on a boundary may flip
