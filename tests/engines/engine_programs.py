"""What the tests that build whole programs share: architectures, and quantised programs without calibration."""

import torch

from hqc.passes import InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import Program

__all__ = ["ARCHS", "quantised"]

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_120")
GRID = (0.0, 300.0, 600.0, 900.0)


def quantised(program: Program, bits: str, kind: str = "symmetric") -> Program:
    """Round-to-nearest weights; activation scales that fill the grid of values of about ±1.5; zero points of all kinds.

    kind: of both ranges, symmetric or asymmetric.
    """
    insert = InsertQdq(GRID, activation=kind, weight=kind)
    program = run_pipeline(program, [SelectLayers(bits=bits), InsertHadamard(), insert])
    step = 0.25 if bits == "w4a4" else 0.015
    tables = {k: torch.linspace(step, 1.4 * step, len(GRID)) for k in program.state if k.endswith("_scale_table")}
    tables |= {k: torch.linspace(0, 15, len(GRID)) for k in program.state if k.endswith("_zero_table")}
    assert tables
    return program.evolve(state={**program.state, **tables})
