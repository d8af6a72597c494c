"""Quantised denoisers of diffusers without calibration: round to nearest, scales for values of about ±1.5."""

from typing import Any

import torch
from denoisers import captured_denoiser

from hqc.passes import InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import Program

__all__ = ["GRID", "quantised"]

GRID = (0.0, 300.0, 600.0, 900.0)
_STEPS = {4: 0.25, 8: 0.015}


def quantised(name: str, bits: str = "w4a4", *, rotated: bool = True, **options: Any) -> Program:
    """options: of insert_qdq. Every timestep has scales of its own, so that the wrong row shows."""
    passes = [SelectLayers(bits=bits), *([InsertHadamard()] if rotated else []), InsertQdq(GRID, **options)]
    program = run_pipeline(captured_denoiser(name), passes)
    sizes = torch.linspace(1.0, 1.6, len(GRID))
    tables = {}
    for plan in program.plan.quantised:
        table = f"{plan.site}.activation_scale_table"
        tables[table] = _STEPS[plan.activation_bits or 8] * sizes[: len(program.state[table])]
    zeros = {k: torch.linspace(0, 15, len(GRID)) for k in program.state if k.endswith("_zero_table")}
    assert tables
    return program.evolve(state={**program.state, **tables, **zeros})
