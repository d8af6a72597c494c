"""`HqcQuantizer`: what `from_pretrained` asks to build a denoiser of integer products and to put its tensors in."""

from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from hqc.errors import ArtefactError
from hqc.integrations.diffusers.config import HqcConfig
from hqc.integrations.diffusers.modules import HqcLayer, TimestepGrid, integer_layer

__all__ = ["GRID", "HqcQuantizer"]

GRID = "hqc_timesteps"
"""The module of a denoiser that knows its calibrated timesteps."""


class HqcQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Loads what `export_diffusers` wrote; it quantises nothing by itself."""

    requires_calibration = True
    quantization_config: HqcConfig

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Refuses weights that are pickled."""
        files = [str(file) for file in checkpoint_files]
        if other := [file for file in files if not file.endswith(".safetensors")]:
            raise ArtefactError(other[0], "is no safetensors file", "Export it again with hqc.")
        return loaded_keys

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether it belongs to one of hqc's modules."""
        return isinstance(_owner(model, param_name), (HqcLayer, TimestepGrid))

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Puts a tensor as it is stored in its place: diffusers has cast `param_value` to the model's type."""
        owner, name = _owner(model, param_name), param_name.rpartition(".")[2]
        stored, wanted = state_dict[param_name], owner._buffers[name]
        assert wanted is not None
        if stored.shape != wanted.shape or stored.dtype != wanted.dtype:
            found = f"is {stored.dtype} {list(stored.shape)}; expected {wanted.dtype} {list(wanted.shape)}"
            raise ArtefactError(param_name, found.replace("torch.", ""), "Export it again with hqc.")
        owner._buffers[name] = stored.to(target_device).contiguous()

    def check_quantized_param_shape(self, *args: Any, **kwargs: Any) -> bool:
        """`create_quantized_param` does, in one line."""
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        with torch.device("meta"):
            for name, form in config.sites.items():
                parent, _, last = name.rpartition(".")
                try:
                    owner = model.get_submodule(parent)
                    layer = owner.get_submodule(last)
                except AttributeError as error:
                    found = "is no layer of this denoiser"
                    raise ArtefactError(f"quantization_config, site {name[:80]}", found, "Export it again.") from error
                setattr(owner, last, integer_layer(name, layer, form, config.rows))
            model.add_module(GRID, TimestepGrid(config.rows))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if missing := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
            raise ArtefactError("weights", f"have no {', '.join(missing[:3])}", "Export it again with hqc.")
        for name, layer in model.named_modules():
            if isinstance(layer, HqcLayer):
                layer.check(name)
        grid = model.get_submodule(GRID)
        assert isinstance(grid, TimestepGrid)
        grid.check()
        grid.watch(model)
        return model

    @property
    def is_serializable(self) -> bool:
        """`save_pretrained` writes what was loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
