"""Which options have an effect only together with others, by command; and whether an option was typed at all.

What depends on the model is refused where the model is known: by `trace` for its source, by `check_sampler` and
`check_runtime`, and by the Python API for a target or a program's stage.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from hqc.errors import OptionError

if TYPE_CHECKING:
    from hqc.sampling import Task

__all__ = [
    "OF_A_RECIPE",
    "RULES",
    "Command",
    "Rule",
    "asked",
    "check_runtime",
    "check_sampler",
    "option_name",
    "served_runtime",
]


@dataclass(frozen=True)
class Rule:
    """An option that has an effect only where the other parameters are as `where` says."""

    parameter: str
    where: Callable[[Mapping[str, Any]], bool]
    found: str
    do: str = "Leave it out."


def _sampled(parameters: Mapping[str, Any]) -> bool:
    return bool(parameters["kind"] == "trajectory")


def _planned(parameter: str) -> Rule:
    return Rule(
        parameter, lambda p: p["target"] is None, "is of a recipe, and --target asks about the program as it is"
    )


def _lowered(parameter: str) -> Rule:
    found = "is for ONNX files that are lowered from a program, and --target triton and diffusers lower none"
    return Rule(parameter, lambda p: p["target"] not in ("triton", "diffusers"), found)


def _served(parameter: str) -> Rule:
    return Rule(parameter, lambda p: p["target"] == "triton", "is for Triton Inference Server", "Give --target triton.")


OF_A_RECIPE = ("recipe", "changes", "bits", "rules", "hadamard", "no_hadamard", "block", "plan_file", "keep_float")

_REPLACES = Rule(
    "force",
    lambda p: p["chart"] is not None or p["work_dir"] is not None,
    "replaces what --chart and --work-dir name, and neither is asked for",
)

RULES: Mapping[str, tuple[Rule, ...]] = {
    "explain": (
        *map(_planned, OF_A_RECIPE),
        Rule("as_yaml", lambda p: p["target"] is None, "is of a plan, and --target asks about the program as it is"),
        Rule("as_yaml", lambda p: not p["as_json"], "and --json exclude each other", "Give one of them."),
    ),
    "qat": (Rule("epochs", lambda p: p["steps"] is None, "and --steps exclude each other", "Give one of them."),),
    "export": (
        *map(_lowered, ("opset", "one_timestep", "functions", "names", "whole", "loras", "merge_lora")),
        Rule(
            "against",
            lambda p: p["target"] != "triton",
            "is for a program, and --target triton takes what was exported",
        ),
        *map(_served, ("max_batch_size", "device")),
        Rule("merge_lora", lambda p: bool(p["loras"]), "merges what --lora names, and none is named"),
    ),
    "analyze": (
        Rule("sensitivity_samples", lambda p: p["sensitivity"] is not False, "is for what --no-sensitivity leaves out"),
    ),
    "eval": (Rule("no_gain_1", lambda p: p["gain_images"] != 0, "is about what --gain-images 0 leaves out"),),
    "compare": (
        Rule("num_inference_steps", _sampled, "is for a sampler, and --inputs noise has none"),
        Rule("guidance_scale", _sampled, "is for a sampler, and --inputs noise has none"),
        Rule("eta", _sampled, "is for a sampler, and --inputs noise has none"),
        Rule("top", lambda p: not p["as_json"], "is for the printed table, and --json gives every site"),
        Rule("force", lambda p: p["csv_file"] is not None, "replaces the file of --csv, and none is asked for"),
    ),
    "bench": (_REPLACES,),
    "bench-serve": (
        _REPLACES,
        Rule(
            "work_dir", lambda p: p["model"].startswith("arch:"), "keeps what is made of arch:NAME, and MODEL is made"
        ),
    ),
}


class Command(click.Command):
    """A command that refuses options without an effect before it begins.

    An option whose value may be left out takes the next word only if that is one of its choices.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The same, with the values written out that were left out."""
        for option in self.params:
            if not isinstance(option, click.Option) or not isinstance(option.type, click.Choice):
                continue
            if isinstance(option.flag_value, str):  # click 8.3 on has a truthy sentinel where there is none
                args = _written_out(args, option.opts[0], option.type.choices, option.flag_value)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        for rule in RULES.get(self.name or "", ()):
            if asked(rule.parameter, ctx) and not rule.where(ctx.params):
                raise OptionError(option_name(rule.parameter, ctx), rule.found, rule.do)
        return super().invoke(ctx)


def _written_out(args: list[str], name: str, choices: Sequence[Any], value: str) -> list[str]:
    following = [*args[1:], ""]
    return [
        f"{name}={value}" if arg == name and after not in choices else arg
        for arg, after in zip(args, following, strict=True)
    ]


def asked(parameter: str, context: click.Context | None = None) -> bool:
    """Whether an option was typed, with whatever value."""
    context = context or click.get_current_context()
    return context.get_parameter_source(parameter) == ParameterSource.COMMANDLINE


def option_name(parameter: str, context: click.Context | None = None) -> str:
    """The option as it is typed: `--csv` for csv_file."""
    context = context or click.get_current_context()
    return next(p.opts[0] for p in context.command.params if p.name == parameter)


_RUNTIMES: Mapping[str, tuple[str, ...]] = {
    "threads": ("onnxruntime",),
    "cache_dir": ("onnxruntime", "tensorrt", "torch-int8"),
}
"""The runtimes that have what an option sets."""


def check_runtime(runtime: str) -> None:
    """Refuses options of other runtimes that were typed.

    Raises:
        OptionError: naming the option.
    """
    for parameter, takers in _RUNTIMES.items():
        if asked(parameter) and runtime not in takers:
            found = f"is for {', '.join(takers)}, and {runtime} runs this model"
            raise OptionError(option_name(parameter), found, "Leave it out.")


def served_runtime(model: str, runtime: str | None) -> str:
    """The runtime that `hqc serve` takes; what it refuses is refused before weights are read.

    Raises:
        OptionError: see `check_runtime`. HqcError: what cannot be opened, or not be asked for images.
    """
    from hqc.lite.opening import RUNTIME, is_exported_pipeline

    if is_exported_pipeline(model):
        return RUNTIME
    from hqc.evaluation.needs import call_kind
    from hqc.runtimes.model import describe, fitting_runtime

    found = describe(model)
    call_kind(found.pipeline, found.conditions)
    chosen = runtime or fitting_runtime(model)
    check_runtime(chosen)
    return chosen


def check_sampler(task: "Task", given: Mapping[str, Any]) -> None:
    """Refuses a guidance and a noise that were typed and that what is sampled does not have.

    Raises:
        OptionError: naming the option.
    """
    import inspect

    from hqc.sampling.task import guides

    guidance, eta = given["guidance_scale"], given["eta"]
    inside = task.guidance_input is not None  # what is sampled has it
    if asked("guidance_scale") and guides(guidance) and task.unconditional is None and not inside:
        kind = "takes its guidance as an input" if task.distilled else "has no condition"
        raise OptionError(f"--guidance-scale {guidance:g}", f"the model {kind}", "Leave it out.")
    scheduler = task.new_scheduler()
    if asked("eta") and eta > 0 and "eta" not in inspect.signature(scheduler.step).parameters:
        raise OptionError(f"--eta {eta:g}", f"{type(scheduler).__name__} has none", "Leave it out.")
