"""What is left out of a capture is counted and named."""

from pathlib import Path

import torch
from torch import Tensor, nn

from hqc.capture import Source, trace
from hqc.capture.unreached import left_out
from hqc.program import InputSpec, Origin

SPECS = (InputSpec("sample", ("N", 4, 4, 4)), InputSpec("timestep", ("N",)))


class Gated(nn.Module):
    """A part that an option of the call would reach, as GLIGEN's fusers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.fuser = nn.Sequential(nn.Linear(4, 15), nn.Linear(3, 5, bias=False))

    def forward(self, sample: Tensor, timestep: Tensor, boxes: Tensor | None = None) -> Tensor:
        if boxes is not None:
            sample = sample + self.fuser(boxes)
        return self.conv(sample) + timestep[:, None, None, None]


def test_parameters_that_the_call_does_not_reach(tmp_path: Path) -> None:
    program = trace(_source(Gated()))
    notes = left_out(Gated(), program, tmp_path)
    assert notes == {"not_reached": "81.8 % of the parameters, by the captured call: fuser.0 (75), fuser.1 (15)"}


def test_a_lora_in_the_folder_is_named(tmp_path: Path) -> None:
    net = Gated()
    del net.fuser
    program = trace(_source(net))
    assert left_out(net, program, tmp_path) == {}
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    assert left_out(net, program, tmp_path) == {
        "not_read": "pytorch_lora_weights.safetensors: --lora FILE adds a LoRA to the weights"
    }
    assert left_out(net, program, None) == {}


def _source(module: nn.Module) -> Source:
    torch.manual_seed(0)
    return Source(module, SPECS, Origin(source="mine"))
