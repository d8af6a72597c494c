"""Quantised zoo models and their exports, made once a session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from mixed_bits import mixed_channels
from torch import fx

from hqc.bits import activation_range, asymmetric_top
from hqc.bounds import FAKE_QUANTISERS
from hqc.export import ExportReport, export_program
from hqc.passes import AttachLora, DropSingleKeyAttention, InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import Program

GRID = (0.0, 300.0, 600.0, 900.0)
HQ_DM = InsertHadamard()


class _Ranges(fx.Interpreter):
    """Runs a quantised program in float and notes each activation quantiser's largest |x|, or the ends of x."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module())
        self.program, self.ends = program, {}

    def run_all(self) -> dict[str, tuple[float, float]]:
        with torch.no_grad():
            self.run(*self.program.example_inputs(4, seed=5))
        return self.ends

    def run_node(self, n: fx.Node):
        if n.target not in FAKE_QUANTISERS:
            return super().run_node(n)
        x = self.fetch_args_kwargs_from_env(n)[0][0]
        if n.meta["role"] == "activation_quantizer":
            self.ends[n.meta["site"]] = (float(x.min()), float(x.max()))
        return x


@pytest.fixture(scope="session")
def quantised(captured: Callable[[str], Program]) -> Callable[..., Program]:
    """quantised("two_sites", "w4a4"): fake quantisation with a LoRA, random deltas, scales near each site's range.

    ranges="asymmetric": both operands, with zero points of all kinds at the timesteps. "mixed": besides, a third of
    the output channels has a bit more, a third one less; "residual": binary codes instead of a bit more.
    """

    @cache
    def build(name: str, bits: str, rotation: InsertHadamard = HQ_DM, ranges: str = "symmetric") -> Program:
        insert = InsertQdq(GRID, activation="asymmetric" if ranges in ("mixed", "residual") else ranges, weight=ranges)
        passes = [DropSingleKeyAttention(), SelectLayers(bits=bits), rotation, insert]
        program = run_pipeline(captured(name), [*passes, AttachLora(rank=3)])
        generator, state = torch.Generator().manual_seed(1), dict(program.state)
        for site, (least, largest) in _Ranges(program).run_all().items():
            spread = 0.8 + 0.4 * torch.rand(len(GRID), generator=generator)
            plan = program.plan[site]
            top = activation_range(plan.activation_bits)[1]
            state[f"{site}.activation_scale_table"] = 0.7 * max(-least, largest) / top * spread
            if not plan.activation_symmetric:
                levels = asymmetric_top(plan.activation_bits)
                # Never whole, and one past each end of what a zero point may be.
                zeros = torch.tensor([-1.3, 0.3 * levels, 0.7 * levels + 0.4, levels + 2.0])
                state[f"{site}.activation_zero_table"] = zeros[torch.randperm(len(GRID), generator=generator)]
        state |= mixed_channels(program, generator)
        for key, tensor in state.items():
            if key.endswith("lora_b"):
                state[key] = 0.05 * torch.randn(tensor.shape, generator=generator)
        return program.evolve(state=state)

    return build


Exported = Callable[..., tuple[Program, Path, ExportReport]]


@pytest.fixture(scope="session")
def exported(
    captured: Callable[[str], Program],
    quantised: Callable[..., Program],
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    """exported(model, bits or None, target, opset=21, rotation=…, ranges="symmetric"): program, folder, report."""

    @cache
    def build(
        name: str,
        bits: str | None,
        target: str,
        opset: int = 21,
        rotation: InsertHadamard = HQ_DM,
        ranges: str = "symmetric",
    ) -> tuple[Program, Path, ExportReport]:
        program = captured(name) if bits is None else quantised(name, bits, rotation, ranges)
        folder = tmp_path_factory.mktemp("exports") / f"{name}_{bits}_{target}_{opset}.onnx"
        report = export_program(program, target, folder, opset=opset, float_program=captured(name) if bits else None)
        return program, folder, report

    return build
