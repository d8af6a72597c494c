"""Weights of a model that the captured call does not reach, and what lies beside it unread: counted and named."""

from collections import Counter
from pathlib import Path

from torch import nn

from hqc.program import Program

__all__ = ["left_out"]

_LISTED = 3
_LORA = ("pytorch_lora_weights*.safetensors", "*lora*.safetensors")


def left_out(module: nn.Module, program: Program, folder: Path | None, prefix: str = "") -> dict[str, str]:
    """Notes for `hqc trace`: parameters that are not in the program, by part; LoRA files in the pipeline's folder.

    prefix: what the program's names go without.
    """
    reached = {tensor.data_ptr() for tensor in program.state.values()}  # tied weights have one name of several
    own = {name.removeprefix(prefix): p for name, p in module.named_parameters() if p.numel()}
    total = sum(p.numel() for p in own.values())
    missing = {n: p.numel() for n, p in own.items() if n not in program.state and p.data_ptr() not in reached}
    notes = {}
    if missing:
        parts: Counter[str] = Counter()
        for name, count in missing.items():
            parts[name.rpartition(".")[0] or name] += count
        shown = ", ".join(f"{part} ({count})" for part, count in parts.most_common(_LISTED))
        more = f" and {len(parts) - _LISTED} more" if len(parts) > _LISTED else ""
        share = 100 * sum(missing.values()) / total
        notes["not_reached"] = f"{share:.1f} % of the parameters, by the captured call: {shown}{more}"
    beside = {path.name for pattern in _LORA for path in folder.glob(pattern)} if folder is not None else set()
    if files := sorted(beside - {style.file for style in program.styles}):
        notes["not_read"] = f"{', '.join(files[:_LISTED])}: --lora FILE adds a LoRA to the weights"
    return notes
