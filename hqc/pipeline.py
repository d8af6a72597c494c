"""Steps and how they run: check, find, apply, verify, record.

A pass is a frozen dataclass whose fields are its options, with two methods: `find(program)`, pure, which reports
matches *and* misses with their reasons, and `apply(program, matches)`, which returns a new Program. It declares the
stages it takes, the stage it gives, and whether the numbers stay the same (`preserves`). A procedure (calibration,
training) is one too, with `run(program, work)` instead: it needs more than the program.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from hqc.attentions import PARTS, part_name
from hqc.errors import PassError
from hqc.program import PassRecord, Program, Stage
from hqc.site_names import whole_site
from hqc.steps import parse_steps, step_text
from hqc.verify import verify

if TYPE_CHECKING:
    from hqc.sampling import Work

__all__ = [
    "Findings",
    "Pass",
    "Procedure",
    "Step",
    "format_pipeline",
    "parse_pipeline",
    "run_pass",
    "run_pipeline",
    "run_procedure",
]


@dataclass(frozen=True)
class Findings:
    """What a pass would touch, and what it leaves alone with the reason."""

    matches: tuple[str, ...] = ()
    misses: tuple[tuple[str, str], ...] = ()


class Pass(Protocol):
    """One rewrite. See the module's docstring."""

    takes: ClassVar[tuple[Stage, ...]]
    gives: ClassVar[Stage | None]
    preserves: ClassVar[str]

    def find(self, program: Program) -> Findings:
        """Sites that `apply` would touch, and misses with reasons."""
        ...

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """The rewritten program."""
        ...


class Procedure(Protocol):
    """A step that runs the program, or looks at its weights, to fill what passes have inserted.

    samples_denoiser: whether it runs the denoiser, along a sampler's trajectory.
    """

    takes: ClassVar[tuple[Stage, ...]]
    gives: ClassVar[Stage | None]
    samples_denoiser: ClassVar[bool]

    def check(self, program: Program, work: "Work") -> None:
        """Raises what can be known before any step has run: too little memory, a sampler that is refused."""
        ...

    def run(self, program: Program, work: "Work") -> Program:
        """The program with other values."""
        ...

    def cost(self, program: Program, work: "Work") -> float:
        """Denoiser evaluations of one sample, backward counting two: what equal budgets are counted in."""
        ...


Step = Pass | Procedure


def format_pipeline(steps: Sequence[Step]) -> str:
    """The pipeline as text that `parse_pipeline` reads back."""
    return ", ".join(step_text(step) for step in steps)


def parse_pipeline(text: str, known: Mapping[str, type]) -> tuple[Any, ...]:
    """Reads passes as text; see `parse_steps`.

    Raises:
        PipelineTextError: for anything else, with the place.
    """
    return parse_steps(text, known)


def run_pass(program: Program, one: Pass, *, check_numerics: bool = False) -> Program:
    """Runs one pass: stage check, find, apply, verify, record.

    With `check_numerics` a pass that declares `preserves = "numerics"` is also run against its input on fixed inputs.

    Raises:
        PassError: if the program is at a stage that the pass does not take, or the result breaks a contract.
    """
    text = step_text(one)
    _require_stage(program, one, text)
    start = time.perf_counter()
    findings = one.find(program)
    result = one.apply(program, findings.matches)
    seconds = round(time.perf_counter() - start, 4)
    left = {name for site, _ in result.sites() for name in (site, whole_site(site))}
    removed = tuple(site for site, _ in program.sites() if site not in left)
    record = PassRecord(text, findings.matches, findings.misses, seconds, removed)
    result = result.evolve(history=(*result.history, record), stage=one.gives or program.stage)
    verify(result, after=text)
    if check_numerics and one.preserves == "numerics":
        _check_numerics(program, result, text)
    return result


def _require_stage(program: Program, step: Step, text: str) -> None:
    if program.stage not in step.takes:
        raise PassError(
            text,
            f"takes a program that is {' or '.join(step.takes)}; this one is {program.stage}",
            f"Run it {'earlier' if program.stage == Stage.INTEGER else 'at that stage'}.",
        )


def run_procedure(program: Program, step: Procedure, work: "Work") -> Program:
    """Runs one procedure: stage check, run, verify, record with the sites whose values it changed.

    Passes that it runs have records of their own; its seconds are those besides.

    Raises:
        PassError: if the program is at a stage that it does not take, or the result breaks a contract.
    """
    text = step_text(step)
    _require_stage(program, step, text)
    start = time.perf_counter()
    result = step.run(program, work)
    changed = {name.rpartition(".")[0] for name, value in result.state.items() if program.state.get(name) is not value}
    touched = tuple(plan.site for plan in result.plan.sites if plan.site in changed)
    touched += tuple(
        one.name for one in result.plan.attentions if any(part_name(one.name, p) in changed for p in PARTS)
    )
    inside = sum(one.seconds for one in result.history[len(program.history) :])
    record = PassRecord(text, touched, (), round(time.perf_counter() - start - inside, 4))
    result = result.evolve(history=(*result.history, record), stage=step.gives or program.stage)
    verify(result, after=text)
    return result


@torch.no_grad()
def _check_numerics(before: Program, after: Program, text: str) -> None:
    args = before.example_inputs(batch=2)
    wanted, found = before.module()(*args), after.module()(*args)
    error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if not bool(wanted.isfinite().all()):
        raise PassError(
            text,
            "cannot be checked: the program gives NaN or infinity for random inputs",
            "Trace it again from a file that is whole.",
        )
    # The tolerance covers the float rounding of a rotation and its inverse through a deep network.
    if not error <= 1e-4:
        raise PassError(text, f"changed the output by {error:.1e} relative; it promises not to", "Report a bug.")


def run_pipeline(program: Program, passes: Sequence[Pass], *, check_numerics: bool = False) -> Program:
    """Runs passes in the order given; never reorders."""
    for one in passes:
        program = run_pass(program, one, check_numerics=check_numerics)
    return program
