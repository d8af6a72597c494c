"""Passes and how they run: find, apply, verify, record; pipelines print and parse as text.

A pass is a frozen dataclass whose fields are its options, with two methods: `find(program)`, pure, which reports
matches *and* misses with their reasons, and `apply(program, matches)`, which returns a new Program. It declares the
stages it takes, the stage it gives, and whether the numbers stay the same (`preserves`).
"""

import ast
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

import torch

from hqc.errors import PassError, PipelineTextError
from hqc.program import PassRecord, Program, Stage
from hqc.verify import verify

__all__ = ["Findings", "Pass", "format_pipeline", "parse_pipeline", "run_pass", "run_pipeline"]


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


def pass_name(kind: type) -> str:
    """InsertHadamard -> insert_hadamard."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__).lower()


def pass_text(one: Pass) -> str:
    """The pass as text: its name and the options that differ from their defaults."""
    options = [
        f"{f.name}={getattr(one, f.name)!r}"
        for f in fields(one)  # type: ignore[arg-type]
        if f.repr and getattr(one, f.name) != f.default
    ]
    return f"{pass_name(type(one))}({', '.join(options)})"


def format_pipeline(passes: Sequence[Pass]) -> str:
    """The pipeline as text that `parse_pipeline` reads back."""
    return ", ".join(pass_text(p) for p in passes)


def parse_pipeline(text: str, known: Mapping[str, type]) -> tuple[Pass, ...]:
    """Reads `insert_hadamard(block=32), insert_qdq()`: known names, literal keyword options, nothing is executed.

    Raises:
        PipelineTextError: for anything else, with the place.
    """
    try:
        tree = ast.parse(f"[{text}]", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PipelineTextError(f"pipeline {text[:80]!r}", f"cannot be parsed ({error})", _SHAPE) from error
    if not isinstance(tree, ast.List):
        raise PipelineTextError(f"pipeline {text[:80]!r}", "is not a list of passes", _SHAPE)
    return tuple(_parse_call(call, known) for call in tree.elts)


_SHAPE = "Write passes as name(option=value), separated by commas."


def _parse_call(call: ast.expr, known: Mapping[str, type]) -> Pass:
    where = f"pipeline item {_unparse(call)!r}"
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise PipelineTextError(where, "is not name(option=value)", _SHAPE)
    if call.func.id not in known:
        raise PipelineTextError(where, f"unknown pass; there are {', '.join(known)}", "Use one of them.")
    kind = known[call.func.id]
    allowed = {f.name: f.default for f in fields(kind)}
    options: dict[str, object] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg not in allowed:
            raise PipelineTextError(where, f"has no option {keyword.arg!r}; it has {', '.join(allowed)}", "Correct it.")
        if keyword.arg in options:
            raise PipelineTextError(where, f"gives option {keyword.arg} twice", "Give it once.")
        options[keyword.arg] = _option(where, keyword.arg, keyword.value, allowed[keyword.arg])
    return kind(**options)  # type: ignore[no-any-return]


def _unparse(call: ast.expr) -> str:
    try:
        return ast.unparse(call)[:80]
    except RecursionError:
        return "…"


def _option(where: str, name: str, value: ast.expr, default: object) -> object:
    """The literal, if it is of the default's type; a list is taken for a tuple, a whole number for a float."""
    try:
        found = ast.literal_eval(value)
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise PipelineTextError(where, f"option {name} is not a literal", "Write a value.") from error
    found = tuple(found) if isinstance(found, list) and isinstance(default, tuple) else found
    found = float(found) if type(found) is int and isinstance(default, float) else found
    if type(found) is not type(default):
        raise PipelineTextError(
            where,
            f"option {name} is a {type(found).__name__}; expected {type(default).__name__}",
            f"Write it as in {name}={default!r}.",
        )
    return found  # type: ignore[no-any-return]


def run_pass(program: Program, one: Pass, *, check_numerics: bool = False) -> Program:
    """Runs one pass: stage check, find, apply, verify, record.

    With `check_numerics` a pass that declares `preserves = "numerics"` is also run against its input on fixed inputs.

    Raises:
        PassError: if the program is at a stage that the pass does not take, or the result breaks a contract.
    """
    text = pass_text(one)
    if program.stage not in one.takes:
        raise PassError(
            text,
            f"takes a program that is {' or '.join(one.takes)}; this one is {program.stage}",
            f"Run it {'earlier' if program.stage == Stage.INTEGER else 'at that stage'}.",
        )
    start = time.perf_counter()
    findings = one.find(program)
    result = one.apply(program, findings.matches)
    seconds = round(time.perf_counter() - start, 4)
    left = {site for site, _ in result.sites()}
    removed = tuple(site for site, _ in program.sites() if site not in left)
    record = PassRecord(text, findings.matches, findings.misses, seconds, removed)
    result = result.evolve(history=(*result.history, record), stage=one.gives or program.stage)
    verify(result, after=text)
    if check_numerics and one.preserves == "numerics":
        _check_numerics(program, result, text)
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


def dry_run(program: Program, passes: Sequence[Pass]) -> Iterator[tuple[Pass, Findings, Program]]:
    """Each pass with its findings and its result: what `hqc explain` prints."""
    for one in passes:
        findings = one.find(program)
        program = run_pass(program, one)
        yield one, findings, program
