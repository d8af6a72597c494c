"""Where the time of a call of `torch-int8` goes."""

import json
import sys

import cpu_profile
import pytest
import torch
from integer_programs import quantised

from hqc.runtimes.integer.cpu import CpuSession
from hqc.runtimes.integer.cpu.own import OwnProducts
from hqc.runtimes.integer.cpu.profile import profile
from hqc.runtimes.integer.cpu.tape import Run
from hqc.search.costs import multiply_adds
from hqc.storage import save_program

BATCH = 2


@pytest.fixture(scope="module")
def cache(native_cache):
    return native_cache


def opened(program, cache):
    session, inputs = CpuSession(program, cache=cache), program.example_inputs(BATCH, seed=3)
    tape = session.tape(*inputs)
    if tape is None:
        pytest.skip(session.report.tiles)
    return session, tape, inputs


@pytest.mark.parametrize("name", ["geometry", "cross_attention"])
def test_every_step_and_call_is_of_one_kind(captured, cache, name: str) -> None:
    session, tape, inputs = opened(quantised(captured(name), "w4a4"), cache)
    kinds = profile(tape, inputs, runs=1)
    steps = sum(part.count for part in tape.parts if isinstance(part, Run))
    assert sum(kind.parts for kind in kinds) == steps + tape.calls
    assert [kind.milliseconds for kind in kinds] == sorted((kind.milliseconds for kind in kinds), reverse=True)
    assert min(kind.milliseconds for kind in kinds) > 0
    assert torch.equal(tape.apart()(*inputs), session(*inputs))


@pytest.mark.parametrize("whose", ["hqc", "oneDNN"])
def test_multiplications_are_those_of_the_layers(captured, cache, whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from the shapes of the graph; 8-bit weights after a rotation are two digits, and channels
    are filled up to whole blocks."""
    if whose == "oneDNN":
        monkeypatch.setattr(OwnProducts, "there", False)
    program = quantised(captured("cross_attention"), "w4a4")
    _, tape, inputs = opened(program, cache)
    kinds = profile(tape, inputs, runs=1)
    own = [kind for kind in kinds if kind.name.endswith(f", {whose}")]
    if whose == "hqc" and not own:
        pytest.skip("products are oneDNN's here")
    digits = {plan.site: 2 if plan.block and plan.weight_bits == 8 else 1 for plan in program.plan.quantised}
    wanted = BATCH * sum(digits[site] * multiply_adds(layer) for site, layer in program.sites())
    assert wanted <= sum(kind.multiplications for kind in own) <= 1.02 * wanted
    assert all(kind.rate > 0 for kind in kinds if kind.multiplications)


def test_the_script_s_samples_share_a_timestep(captured, cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in sampling: products of mixed timesteps take another way."""
    program, seen = quantised(captured("two_sites"), "w4a4"), []
    opened(program, cache)
    monkeypatch.setattr(cpu_profile, "load_program", lambda path: program)
    monkeypatch.setattr(cpu_profile, "CpuSession", lambda program: CpuSession(program, cache=cache))
    monkeypatch.setattr(cpu_profile, "profile", lambda tape, inputs, runs: seen.append(inputs) or ())
    cpu_profile.profile_program(cpu_profile.Path("q.hqc"), 3, 1)
    ((sample, timestep),) = seen
    assert len(timestep) == 3
    assert len(set(timestep.tolist())) == 1
    assert not torch.equal(sample[0], sample[1])


def test_the_script_prints_a_table_or_json(captured, cache, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    path, program = tmp_path / "q.hqc", quantised(captured("two_sites"), "w4a4")
    opened(program, cache)
    save_program(program, path)
    arguments = ["cpu_profile.py", str(path), "--batch-size", "3", "--runs", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert cpu_profile.main() == 0
    assert "q.hqc, batch 3, 1 threads: " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    assert cpu_profile.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kernels_ms"] == pytest.approx(sum(kind["milliseconds"] for kind in found["kinds"]))
    monkeypatch.setattr(sys, "argv", ["cpu_profile.py", str(tmp_path / "none.hqc")])
    with pytest.raises(SystemExit) as left:
        cpu_profile.main()
    assert left.value.code == 2
    assert "no such folder" in capsys.readouterr().err
    monkeypatch.setattr(CpuSession, "tape", lambda self, *inputs: None)
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as left:
        cpu_profile.main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("cpu_profile: the tape: there is none: ")
