"""Prompts as conditions: encoded once by the pipeline's own tokenizers and text encoders, then drawn from.

    condition    [N, L, D]  what diffusers' `encode_prompt` gives: the last hidden states, or SDXL's two encoders joined
    text_embeds  [N, P]     SDXL's pooled projection
    time_ids     [N, 6]     SDXL's sizes of an uncropped image; [N, 5] of its refiner

The null conditions are those of the empty prompt, or zeros where the pipeline's configuration says so.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqc.errors import TrainingError
from hqc.memory import require_memory
from hqc.program import InputSpec, Program
from hqc.quiet import quiet_libraries
from hqc.training.task import Condition, Task
from hqc.training.task_sources import conditions_of, task_settings, time_ids

__all__ = ["prompt_task", "read_prompts", "require_prompt_inputs"]

_ENCODED = ("condition", "text_embeds")
_TIME_IDS = "time_ids"
_TAKEN = ({"condition"}, {"condition", "text_embeds", _TIME_IDS})
_PROMPTS_AT_ONCE = 8
_LARGEST_FILE = 64 * 2**20
# The refiner's aesthetic score, and that of what guidance leads away from: StableDiffusionXLImg2ImgPipeline's own.
_SCORE, _NULL_SCORE = 6.0, 2.5


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a UTF-8 text file, one a line; empty lines are left out.

    Raises:
        TrainingError: if it cannot be read, is no UTF-8 text, or holds no prompt.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise TrainingError(str(path), f"cannot be read ({error.strerror})", "Check the path.") from error
    if len(content) > _LARGEST_FILE:
        raise TrainingError(str(path), f"is larger than {_LARGEST_FILE // 2**20} MiB", "Give a part of it.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        raise TrainingError(str(path), f"is no UTF-8 text ({found})", "Save it as UTF-8.") from error
    prompts = tuple(line.strip() for line in re.split(r"[\r\n]+", text) if line.strip())
    if not prompts:
        raise TrainingError(str(path), "holds no prompt", "Write one prompt a line.")
    return prompts


def require_prompt_inputs(program: Program) -> None:
    """Refuses a denoiser whose conditions are not what prompts are encoded into.

    Raises:
        TrainingError: naming its conditions.
    """
    names = [spec.name for spec in conditions_of(program.inputs)]
    if set(names) in _TAKEN:
        return
    raise TrainingError(
        f"program from {program.origin.source or 'a module'}",
        f"takes {', '.join(names) or 'no condition'}; prompts give condition, with text_embeds and time_ids for SDXL",
        "Leave --prompts out, or give --synthetic.",
    )


def prompt_task(pipeline: Any, program: Program, prompts: Sequence[str]) -> Task:
    """The task of a text-conditional UNet on these prompts: every one is drawn before any comes again.

    Nothing of the pipeline is kept but the scheduler's configuration: its text encoders can be freed.

    Raises:
        TrainingError: if the pipeline has no text encoder, or encodes into something else than the denoiser takes.
        MemoryShortError: if the encoded prompts do not fit the memory that is free.
    """
    require_prompt_inputs(program)
    if not prompts:
        raise TrainingError("prompts", "there are none", "Give one at least.")
    if _text_encoder(pipeline) is None:
        raise TrainingError(type(pipeline).__name__, "has no text encoder to encode prompts with", "Give --synthetic.")
    wanted = conditions_of(program.inputs)
    each_prompt = 4 * sum(math.prod(int(d) for d in spec.shape[1:]) for spec in wanted)
    require_memory(f"encoding {len(prompts)} prompts", 2 * len(prompts) * each_prompt, "Give fewer prompts")
    encoded, null = _encode(pipeline, prompts)
    for spec in wanted:
        _check(spec, encoded, pipeline)
    height, width = _pixels(pipeline, program)

    def each(rows: Mapping[str, Tensor], n: int, score: float) -> Condition:
        found = [rows[s.name] if s.name in rows else time_ids(s, n, height, width, score) for s in wanted]
        return found[0] if len(found) == 1 else tuple(found)

    def draw(n: int, generator: torch.Generator) -> Condition:
        rounds = [torch.randperm(len(prompts), generator=generator) for _ in range(-(-n // len(prompts)))]
        chosen = torch.cat(rounds)[:n]
        return each({name: rows[chosen] for name, rows in encoded.items()}, n, _SCORE)

    def nothing(n: int) -> Condition:
        return each({name: row.repeat(n, *[1] * (row.ndim - 1)) for name, row in null.items()}, n, _NULL_SCORE)

    return Task(
        **task_settings(pipeline.scheduler, program),
        draw_conditions=draw,
        unconditional=nothing,
        drawn_from=_described(pipeline, prompts),
    )


def _text_encoder(pipeline: Any) -> Any | None:
    """The last text encoder, which decides; None without one."""
    if not hasattr(pipeline, "encode_prompt"):
        return None
    found = [getattr(pipeline, name, None) for name in ("text_encoder_2", "text_encoder")]
    return next((encoder for encoder in found if encoder is not None), None)


# ---- encoding ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _encode(pipeline: Any, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By input, all prompts [P, …] and the null condition [1, …], in float32."""
    device = _text_encoder(pipeline).device  # type: ignore[union-attr]

    def run(some: Sequence[str], guided: bool) -> tuple[Tensor | None, ...]:
        options = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": guided}
        return tuple(pipeline.encode_prompt(list(some), **options))

    with quiet_libraries():
        pieces = [run(prompts[i : i + _PROMPTS_AT_ONCE], False) for i in range(0, len(prompts), _PROMPTS_AT_ONCE)]
        nulls = run(prompts[:1], True)
    # (prompts, null) and for SDXL (pooled prompts, pooled null) behind them.
    places = [i for i in (0, 2) if i < len(nulls)]
    names = dict(zip(places, _ENCODED, strict=False))
    encoded = {name: torch.cat([_plain(piece[i]) for piece in pieces]) for i, name in names.items()}
    return encoded, {name: _plain(nulls[i + 1]) for i, name in names.items()}


def _plain(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.float().cpu()


def _check(spec: InputSpec, encoded: Mapping[str, Tensor], pipeline: Any) -> None:
    """Refuses an encoder that gives another shape than the denoiser takes."""
    if spec.name == _TIME_IDS:
        return
    found = list(encoded[spec.name].shape[1:]) if spec.name in encoded else None
    if found == list(spec.shape[1:]):
        return
    kind, taken = type(pipeline).__name__, f"the denoiser takes {list(spec.shape[1:])}"
    if found is None:
        raise TrainingError(spec.name, f"{kind} does not encode it; {taken}", "Give the denoiser's own pipeline.")
    length = found[0] if len(found) == 2 and found[1:] == list(spec.shape[2:]) else None
    do = f"Trace it with --condition-length {length}." if length is not None else "Give the denoiser's own pipeline."
    raise TrainingError(spec.name, f"{kind} encodes a prompt into {found}; {taken}", do)


def _pixels(pipeline: Any, program: Program) -> tuple[float, float]:
    """Height and width of the images that the program's latents decode into."""
    height, width = next(spec.shape[2:] for spec in program.inputs if spec.name == "sample")
    scale = getattr(pipeline, "vae_scale_factor", 8)
    return float(int(height) * scale), float(int(width) * scale)


def _described(pipeline: Any, prompts: Sequence[str]) -> str:
    """How many, which (so that reports and resumed runs tell them apart), and whether some are cut."""
    digest = hashlib.sha256("\n".join(prompts).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    tokenizers = [getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2")]
    with quiet_libraries():
        cut = sum(any(t is not None and _is_cut(t, prompt) for t in tokenizers) for prompt in prompts)
    count = f"{len(prompts)} prompt{'s' if len(prompts) > 1 else ''} (sha256 {digest})"
    return f"{count}, {cut} of them longer than the tokenizer takes and cut" if cut else count


def _is_cut(tokenizer: Any, prompt: str) -> bool:
    return len(tokenizer(prompt).input_ids) > int(tokenizer.model_max_length)
