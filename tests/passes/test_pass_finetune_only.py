"""Which layers may learn: those that are named, as many as fit into a share of the parameters, and what is said."""

from collections.abc import Callable

import pytest

from hqc.errors import HqcError, PlanError
from hqc.passes import AttachLora, FinetuneOnly, InsertQdq, InsertSmoothing, SelectLayers
from hqc.pipeline import run_pass, run_pipeline
from hqc.program import Program
from hqc.recipes import find_recipe
from hqc.recipes.run import Request, begin
from hqc.site_rules import rule_from_data

Captured = Callable[[str], Program]


def inserted(program: Program, *, bits: str = "w4a4", smoothed: bool = False) -> Program:
    smoothing = [InsertSmoothing()] if smoothed else []
    return run_pipeline(program, [SelectLayers(bits=bits), *smoothing, InsertQdq((0.0, 500.0))])


def learning(program: Program) -> set[str]:
    return {plan.site for plan in program.plan.quantised if plan.trained}


def sizes(program: Program) -> dict[str, int]:
    """Weight and two rows of scales, by the names alone."""
    return {site: program.state[f"{site}.weight"].numel() + 2 for site, _ in program.sites()}


def parameters(program: Program) -> int:
    return sum(tensor.numel() for tensor in program.state.values() if tensor.is_floating_point())


def test_only_the_named_layers_learn(captured: Captured) -> None:
    program = inserted(captured("cross_attention"))
    result = run_pass(program, FinetuneOnly(("*.to_q", "time_embedding*"), share=1.0))
    wanted = {site for site, _ in program.sites() if site.endswith(".to_q") or site.startswith("time_embedding")}
    assert learning(result) == wanted
    assert any(program.plan[site].weight_bits == 8 for site in wanted), "edges may be named too"
    assert learning(program) - wanted, "others might have"
    assert all(result.state[name] is tensor for name, tensor in program.state.items())
    misses = dict(FinetuneOnly(("*.to_q", "*.nothing"), share=1.0).find(program).misses)
    assert misses["conv_in"] == "not among the layers to finetune"
    assert misses["*.nothing"] == "names no layer that may learn"


def test_patterns_take_turns_smallest_first(captured: Captured) -> None:
    """By hand: in turns one layer each, until the next of each pattern does not fit any more."""
    program = inserted(captured("cross_attention"))
    size, total = sizes(program), parameters(program)
    patterns = ("*.to_q", "*.ff.net.*", "*.conv?")
    queues = [
        sorted((s for s in size if s.endswith(".to_q")), key=size.__getitem__),
        sorted((s for s in size if ".ff.net." in s), key=size.__getitem__),
        sorted((s for s in size if s.rpartition(".")[2] in ("conv1", "conv2")), key=size.__getitem__),
    ]
    assert all(queues)
    for share in (0.05, 0.1, 0.2, 0.4):
        room, wanted, left = share * total, set(), [list(queue) for queue in queues]
        while any(left):
            for queue in left:
                if queue and size[queue[0]] <= room:
                    room -= size[queue[0]]
                    wanted.add(queue.pop(0))
                else:
                    queue.clear()
        result = run_pass(program, FinetuneOnly(patterns, share=share))
        assert learning(result) == wanted
        learn = sum(size[site] for site in wanted)
        assert 0 < learn <= share * total
        misses = dict(result.history[-1].missed)
        for site in {site for queue in queues for site in queue} - wanted:
            found = f"{100 * (learn + size[site]) / total:.3g}"
            assert misses[site] == f"with it {found} % of the parameters would learn; at most {100 * share:.3g} % may"
            assert result.plan[site].reason.endswith(misses[site])


def test_what_is_smoothed_counts_its_own_weight(captured: Captured) -> None:
    program = inserted(captured("two_sites"), smoothed=True)
    assert learning(run_pass(program, FinetuneOnly(("conv",), share=1.0))) == {"conv"}


def test_shared_weights_stay(captured: Captured) -> None:
    """What one of two readers learns would change the other."""
    program = inserted(captured("shared_weights"))
    with pytest.raises(PlanError, match=r"names no quantised layer that may learn"):
        FinetuneOnly(("conv", "linear@2"), share=1.0).find(program)
    own = inserted(captured("shared_weights"), smoothed=True)  # each has a weight of its own
    assert set(FinetuneOnly(("conv", "linear@2"), share=1.0).find(own).matches) == {"conv", "linear@2"}


def test_what_has_a_lora_is_left_to_it(captured: Captured) -> None:
    program = run_pass(inserted(captured("two_sites")), AttachLora(rank=2))
    with pytest.raises(PlanError, match="names no quantised layer that may learn"):
        FinetuneOnly(("conv",), share=1.0).find(program)


def test_weights_of_tables_stay(captured: Captured) -> None:
    beside_codes, beside_floats = (
        run_pipeline(captured("two_sites"), [SelectLayers(bits="w4a8"), InsertQdq((0.0,), kind, weight="lookup")])
        for kind in ("symmetric", "float")
    )
    with pytest.raises(PlanError, match="names no quantised layer that may learn"):
        FinetuneOnly(("conv",), share=1.0).find(beside_codes)
    found = FinetuneOnly(("conv",), share=1.0).find(beside_floats)
    assert found.matches == ()
    assert {"conv", "head"} <= {site for site, _ in found.misses}


def test_a_plan_that_leaves_a_layer_untrained_has_the_last_word(captured: Captured) -> None:
    rules = (rule_from_data({"pattern": "conv", "trained": False}, "rule 1"),)
    begun = begin(captured("two_sites"), find_recipe("rtn"), Request("w4a4", rules=rules))
    program = run_pipeline(begun, [SelectLayers(), InsertQdq((0.0,))])
    found = FinetuneOnly(share=1.0).find(program)
    assert set(found.matches) == {"head"}
    assert dict(found.misses)["conv"] == "rule 1 says that it is not trained"


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (
            FinetuneOnly(("conv",), share=0.001),
            r"the smallest, conv, is \d[\d.]* % of the parameters; at most 0.1 %",
        ),
        (FinetuneOnly(("*.to_q",)), r"finetune_only of \*.to_q: names no quantised layer that may learn"),
    ],
)
def test_nothing_to_finetune_is_refused(captured: Captured, step: FinetuneOnly, said: str) -> None:
    with pytest.raises(PlanError, match=said) as caught:
        run_pass(inserted(captured("two_sites")), step)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.5}, {"sites": "*"}])
def test_options_out_of_bounds_are_refused(options: dict) -> None:
    with pytest.raises(HqcError):
        FinetuneOnly(**options)
