"""Prompts as conditions: encoded once by the pipeline's own tokenizers and text encoders, then drawn from.

The null conditions are those of the empty prompt, or zeros where the pipeline's configuration says so.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hqc.errors import TrainingError
from hqc.memory import require_memory
from hqc.program import InputSpec, Program
from hqc.prompt_files import read_prompts
from hqc.sampling.prompt_encoding import (
    BESIDE,
    beside,
    cut_prompts,
    encode,
    encoded_names,
    facts_of,
)
from hqc.sampling.sources import conditions_of, distilled, task_settings
from hqc.sampling.task import Condition, Task

__all__ = ["prompt_task", "read_prompts", "require_prompt_inputs"]


def require_prompt_inputs(program: Program) -> None:
    """Refuses a denoiser whose conditions are not what prompts are encoded into.

    Raises:
        TrainingError: naming its conditions.
    """
    names = [spec.name for spec in conditions_of(program.inputs)]
    encoded = encoded_names(program.origin.kind)
    if "condition" in names and encoded | BESIDE >= set(names):
        return
    raise TrainingError(
        f"program from {program.origin.source or 'a module'}",
        f"takes {', '.join(names) or 'no condition'}; prompts give {', '.join(sorted(encoded))}",
        "Leave --prompts out, or give --synthetic.",
    )


def prompt_task(
    pipeline: Any, program: Program, prompts: Sequence[str], *, guidance_scale: float | None = None
) -> Task:
    """The task of a text-conditional denoiser on these prompts: every one is drawn before any comes again.

    Nothing of the pipeline is kept but the scheduler's configuration: its text encoders can be freed.
    guidance_scale: of a denoiser that takes it as an input (Flux, latent consistency models); None takes the
    pipeline's own default. An upscaler's noise level is its pipeline's own default too.

    Raises:
        TrainingError: if the pipeline has no text encoder, or encodes into something else than the denoiser takes.
        MemoryShortError: if the encoded prompts do not fit the memory that is free.
    """
    require_prompt_inputs(program)
    if not prompts:
        raise TrainingError("prompts", "there are none", "Give one at least.")
    encoder = _text_encoder(pipeline)
    if encoder is None:
        raise TrainingError(type(pipeline).__name__, "has no text encoder to encode prompts with", "Give --synthetic.")
    wanted = conditions_of(program.inputs)
    each_prompt = 4 * sum(math.prod(int(d) for d in spec.shape[1:]) for spec in wanted)
    require_memory(f"encoding {len(prompts)} prompts", 2 * len(prompts) * each_prompt, "Give fewer prompts")
    encoded = encode(pipeline, program, prompts, encoder.device)
    facts = facts_of(pipeline, program, guidance_scale)
    for spec in wanted:
        if spec.name not in BESIDE:
            _check(spec, encoded.prompts, pipeline)
    others = [spec for spec in wanted if spec.name in BESIDE]
    besides = [{spec.name: beside(spec, facts, null=null) for spec in others} for null in (False, True)]

    def each(rows: Mapping[str, Tensor], n: int, *, null: bool) -> Condition:
        found = tuple(
            rows[spec.name].to(getattr(torch, spec.dtype)) if spec.name in rows else _for(n, spec, besides[null])
            for spec in wanted
        )
        return found[0] if len(found) == 1 and found[0] is not None else found

    def draw(n: int, generator: torch.Generator) -> Condition:
        rounds = [torch.randperm(len(prompts), generator=generator) for _ in range(-(-n // len(prompts)))]
        chosen = torch.cat(rounds)[:n]
        return each({name: rows[chosen] for name, rows in encoded.prompts.items()}, n, null=False)

    def nothing(n: int) -> Condition:
        rows = {name: row.repeat(n, *[1] * (row.ndim - 1)) for name, row in encoded.null.items()}
        return each(rows, n, null=True)

    alone = distilled(wanted)
    return Task(
        **task_settings(pipeline.scheduler, program),
        draw_conditions=draw,
        unconditional=None if alone else nothing,
        distilled=alone,
        guidance_input=facts.guidance_scale if alone else None,
        drawn_from=_described(pipeline, program, prompts) + (f", guidance {facts.guidance_scale:g}" if alone else ""),
    )


def _for(n: int, spec: InputSpec, rows: Mapping[str, Tensor | None]) -> Tensor | None:
    """The row of an input for n samples, or what all of them share."""
    row = rows[spec.name]
    if row is None or not spec.batched:
        return row
    return row.expand(n, *row.shape[1:]).contiguous()


def _text_encoder(pipeline: Any) -> Any | None:
    """The last text encoder, which decides; None without one."""
    names = ("text_encoder_2", "text_encoder") if hasattr(pipeline, "encode_prompt") else ("bert",)
    found = [getattr(pipeline, name, None) for name in names]
    return next((encoder for encoder in found if encoder is not None), None)


def _check(spec: InputSpec, encoded: Mapping[str, Tensor], pipeline: Any) -> None:
    """Refuses an encoder that gives another shape than the denoiser takes."""
    found = list(encoded[spec.name].shape[1:]) if spec.name in encoded else None
    if found == list(spec.shape[1:]):
        return
    kind, taken = type(pipeline).__name__, f"the denoiser takes {list(spec.shape[1:])}"
    if found is None:
        raise TrainingError(spec.name, f"{kind} does not encode it; {taken}", "Give the denoiser's own pipeline.")
    length = found[0] if len(found) == 2 and found[1:] == list(spec.shape[2:]) else None
    do = f"Trace it with --condition-length {length}." if length is not None else "Give the denoiser's own pipeline."
    raise TrainingError(spec.name, f"{kind} encodes a prompt into {found}; {taken}", do)


def _described(pipeline: Any, program: Program, prompts: Sequence[str]) -> str:
    """How many, which (so that reports and resumed runs tell them apart), and whether some are cut."""
    digest = hashlib.sha256("\n".join(prompts).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    cut = cut_prompts(pipeline, prompts, program.inputs)
    count = f"{len(prompts)} prompt{'s' if len(prompts) > 1 else ''} (sha256 {digest})"
    return f"{count}, {cut} of them longer than the tokenizer takes and cut" if cut else count
