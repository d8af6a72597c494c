"""Layers of a denoiser that diffusers has loaded, on a GPU: the kernels against the same in plain torch."""

from pathlib import Path

import pytest
import torch
from quantised_denoisers import GRID, quantised
from torch import Tensor

from hqc.ops import nearest_timestep
from hqc.running import run_module

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@torch.no_grad()
def test_it_runs_the_kernels(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every layer by itself, given what it was given on the GPU; then the denoiser."""
    diffusers = pytest.importorskip("diffusers")
    from hqc.capture.diffusers_models import Denoiser
    from hqc.export.reference import verification_inputs
    from hqc.integrations.diffusers import export_diffusers
    from hqc.integrations.diffusers.modules import HqcLayer, current_rows

    program = quantised("sd15")
    export_diffusers(program, tmp_path / "x")
    load = diffusers.UNet2DConditionModel.from_pretrained
    model, args = load(tmp_path / "x", torch_dtype=dtype).to("cuda"), verification_inputs(program, 4)
    plain = {name: layer for name, layer in load(tmp_path / "x").named_modules() if isinstance(layer, HqcLayer)}
    heard: dict[str, tuple[Tensor, Tensor]] = {}
    for name in plain:
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda _, given, y, name=name: heard.update({name: (given[0].cpu(), y.cpu())}))
    on_gpu = (args[0].to("cuda", dtype), args[1].cuda(), args[2].to("cuda", dtype))
    output = Denoiser(model, [spec.name for spec in program.inputs])(*on_gpu)
    assert heard.keys() == plain.keys()
    token = current_rows.set(nearest_timestep(args[1], torch.tensor(GRID)))
    for name, (x, y) in heard.items():
        wanted = plain[name](x).float()
        differs = (wanted - y.float()).abs() > 1e-2 * wanted.abs().max()
        assert float(differs.float().mean()) <= 1e-2, name  # a code on a rounding boundary moves what reads it
    current_rows.reset(token)
    assert output.dtype == dtype
    reference = run_module(program.module(), *args)
    assert float((output.float().cpu() - reference).norm() / reference.norm()) <= 0.5
