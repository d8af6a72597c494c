"""Quantised zoo models and their exports, made once a session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import fx

from hqc.export import ExportReport, export_program
from hqc.passes import AttachLora, DropSingleKeyAttention, InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import Program

GRID = (0.0, 300.0, 600.0, 900.0)
HQ_DM = InsertHadamard()


class _Ranges(fx.Interpreter):
    """Runs a quantised program in float and notes max |x|/qmax·0.7 at every activation quantiser."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module())
        self.program, self.scales = program, {}

    def run_all(self) -> dict[str, float]:
        with torch.no_grad():
            self.run(*self.program.example_inputs(4, seed=5))
        return self.scales

    def run_node(self, n: fx.Node):
        if n.target is not torch.ops.hqc.fake_quantize.default:
            return super().run_node(n)
        x, _, _, high = self.fetch_args_kwargs_from_env(n)[0]
        if n.meta["role"] == "activation_quantizer":
            self.scales[n.meta["site"]] = 0.7 * float(x.abs().max()) / high
        return x


@pytest.fixture(scope="session")
def quantised(captured: Callable[[str], Program]) -> Callable[..., Program]:
    """quantised("two_sites", "w4a4"): fake quantisation with a LoRA, random deltas, scales near each site's range."""

    @cache
    def build(name: str, bits: str, rotation: InsertHadamard = HQ_DM) -> Program:
        passes = [DropSingleKeyAttention(), SelectLayers(bits=bits), rotation, InsertQdq(GRID)]
        program = run_pipeline(captured(name), [*passes, AttachLora(rank=3)])
        generator, state = torch.Generator().manual_seed(1), dict(program.state)
        for site, scale in _Ranges(program).run_all().items():
            spread = 0.8 + 0.4 * torch.rand(len(GRID), generator=generator)
            state[f"{site}.activation_scale_table"] = scale * spread
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
    """exported(model, bits or None, target, opset=21, rotation=HQ-DM's): (program, folder, report)."""

    @cache
    def build(
        name: str, bits: str | None, target: str, opset: int = 21, rotation: InsertHadamard = HQ_DM
    ) -> tuple[Program, Path, ExportReport]:
        program = captured(name) if bits is None else quantised(name, bits, rotation)
        folder = tmp_path_factory.mktemp("exports") / f"{name}_{bits}_{target}_{opset}.onnx"
        report = export_program(program, target, folder, opset=opset, float_program=captured(name) if bits else None)
        return program, folder, report

    return build
