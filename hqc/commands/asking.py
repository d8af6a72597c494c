"""What `sample` and `eval` ask a model with: labels, prompts, or nothing; and what does not apply is refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import asked as typed
from hqc.commands.applies import option_name
from hqc.commands.options import options
from hqc.errors import EvaluationError, OptionError
from hqc.lite.opening import is_exported_pipeline

if TYPE_CHECKING:
    from hqc.evaluation.sampling import Samples
    from hqc.evaluation.trajectory_fidelity import TrajectoryFidelity
    from hqc.needs import Kind, Needs

__all__ = ["Asked", "asked_for", "asking_options", "followed", "sampled"]

_MOST_LABELS = 10_000
_CLASSES_SHOWN = 10
_TAKES = {"prompt": "prompts", "class_label": "class labels", "nothing": "neither labels nor prompts"}
_BELONGS: Mapping[str, "Kind"] = {
    "labels": "class_label",
    "prompt": "prompt",
    "prompts": "prompt",
    "negative_prompt": "prompt",
}

asking_options = options(
    click.option("--labels", help="Classes: 0-9 or 1,4,7 (default: the first ten).", metavar="CLASSES"),
    click.option("--prompt", multiple=True, metavar="TEXT", help="For a text-conditional model; may repeat."),
    click.option(
        "--prompts", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="The same, one a line."
    ),
    click.option("--negative-prompt", metavar="TEXT", help="What guidance leads away from."),
)


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    labels: None takes the first ten classes.
    """

    labels: Sequence[int] | None
    prompts: tuple[str, ...]
    negative_prompt: str

    def check_kind(self, model: str) -> None:
        """Refuses options that the model does not take, and a missing prompt, before its weights are read.

        Raises:
            OptionError: naming the option. EvaluationError: if the model cannot be sampled, or a prompt is missing.
            ArtefactError: if there is no such model, or no pipeline around it.
        """
        kind, pipeline = _kind_of(model)
        for name, wanted in _BELONGS.items():
            if typed(name) and kind != wanted:
                raise OptionError(option_name(name), f"{model} takes {_TAKES[kind]} ({pipeline})", "Leave it out.")
        if kind == "prompt" and not self.prompts:
            raise EvaluationError(model, f"takes prompts ({pipeline})", "Give --prompt TEXT or --prompts FILE.")

    def rows(self, needs: "Needs") -> Sequence[int]:
        """The classes or numbers of prompts to draw; one 0 for a model that is asked for nothing.

        Raises:
            EvaluationError: for a class that the model does not have.
        """
        if needs.kind == "nothing":
            return (0,)
        if needs.kind == "prompt":
            return range(len(self.prompts))
        rows = self.labels if self.labels is not None else range(min(_CLASSES_SHOWN, needs.classes))
        needs.check_labels(rows)
        return rows

    def sampler(self, needs: "Needs", sampler: Mapping[str, Any], *, as_calibrated: bool = False) -> dict[str, Any]:
        """The sampler's options for this model; where no guidance was typed, the pipeline's own, or what it can give.

        as_calibrated: recipes know no pipeline's own guidance, so that the sampler's is taken for prompts too.

        Raises:
            OptionError: for guidance or eta that was typed, would do something, and that the pipeline does not take.
            EvaluationError: for guidance that the pipeline cannot give with this model.
        """
        for name, least in (("guidance_scale", 1.0), ("eta", 0.0)):
            if typed(name) and name not in needs.options and sampler[name] > least:
                raise OptionError(
                    f"{option_name(name)} {sampler[name]:g}", f"{needs.pipeline} takes none", "Leave it out."
                )
        if typed("guidance_scale"):
            needs.check_guidance(sampler["guidance_scale"])
            return dict(sampler)
        if as_calibrated and not needs.distilled:
            needs = replace(needs, own_guidance=None)
        return {**sampler, "guidance_scale": needs.usual_guidance(sampler["guidance_scale"])}


def _kind_of(model: str) -> "tuple[Kind, str]":
    """What a model is asked with, and the class of its pipeline; its weights are not read."""
    if is_exported_pipeline(model):
        from hqc.lite.forms import kind_of_pipeline

        return kind_of_pipeline(Path(model))
    from hqc.evaluation.needs import call_kind
    from hqc.runtimes.model import describe

    found = describe(model)
    return call_kind(found.pipeline, found.conditions), found.pipeline.__name__


def asked_for(labels: str | None, prompt: tuple[str, ...], prompts: Path | None, negative: str | None) -> Asked:
    """The options as they were typed; the file of prompts is read.

    Raises:
        OptionError: if both --prompt and --prompts are given, or a prompt is empty. TrainingError: for a file that
        holds no prompts.
    """
    if prompt and prompts is not None:
        raise OptionError("--prompts", "and --prompt exclude each other", "Give one of them.")
    if prompts is not None:
        from hqc.prompt_files import read_prompts

        prompt = read_prompts(prompts)
    if any(not text.strip() for text in prompt):
        raise OptionError("--prompt", "is empty", "Say what to draw.")
    return Asked(None if labels is None else _labels(labels), prompt, negative or "")


def _labels(text: str) -> Sequence[int]:
    try:
        first, _, last = text.partition("-")
        labels = range(int(first), int(last) + 1) if last else [int(part) for part in text.split(",")]
        if not 0 < len(labels) <= _MOST_LABELS:
            raise ValueError(text)
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(f"{text!r}; expected 0-9 or 1,4,7", param_hint="--labels") from error
    return labels


def sampled(
    model: str, pipe: Any, asked: Asked, labels: Sequence[int], seed: int, batch_size: int | None, **sampler: Any
) -> "Samples":
    """Images of a loaded pipeline with a progress bar, from consecutive seeds.

    Raises:
        EvaluationError, TrainingError: see `sample_images`.
    """
    from hqc import console as out
    from hqc.evaluation.needs import denoiser_of
    from hqc.evaluation.sampling import as_one_line, sample_images
    from hqc.sampling.prompt_encoding import cut_prompts

    if cut := cut_prompts(pipe, asked.prompts, denoiser_of(pipe).inputs):
        click.echo(f"{model}: {cut} of {len(asked.prompts)} prompts are longer than its tokenizer takes: cut", err=True)
    with as_one_line(model, pipe), out.progress(f"sampling {model}", len(labels)) as advance:
        return sample_images(
            pipe,
            labels,
            range(seed, seed + len(labels)),
            batch_size=_at_once(pipe, batch_size),
            prompts=asked.prompts,
            negative_prompt=asked.negative_prompt,
            **sampler,
            progress=lambda done, _: advance(done, ""),
        )


def followed(
    model: str,
    pipe: Any,
    reference: Any,
    asked: Asked,
    labels: Sequence[int],
    seed: int,
    batch_size: int | None,
    **sampler: Any,
) -> "TrajectoryFidelity":
    """How a loaded pipeline follows the float model's through the sampler, with a progress bar, from consecutive seeds.

    Raises:
        EvaluationError, TrainingError: see `trajectory_fidelity`.
    """
    from hqc import console as out
    from hqc.evaluation.sampling import as_one_line
    from hqc.evaluation.trajectory_fidelity import RUNS, trajectory_fidelity

    with as_one_line(model, pipe), out.progress(f"following {model}", RUNS * len(labels)) as advance:
        return trajectory_fidelity(
            pipe,
            reference,
            labels,
            range(seed, seed + len(labels)),
            batch_size=_at_once(pipe, batch_size),
            prompts=asked.prompts,
            negative_prompt=asked.negative_prompt,
            **sampler,
            progress=lambda done, _: advance(done, ""),
        )


def _at_once(pipe: Any, batch_size: int | None) -> int:
    from hqc.evaluation.needs import needs_of

    return batch_size or needs_of(pipe).at_once
