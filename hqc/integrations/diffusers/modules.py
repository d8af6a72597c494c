"""Layers of integer products in the place of `nn.Linear` and `nn.Conv2d`, and what tells them the timestep.

    y = int_op(Q(Ĥ·x; s[row]), w)·s_w·s[row] + bias,   row = the calibrated timestep nearest to the sample's own

On a GPU they run hqc's Triton kernels, elsewhere the same in plain torch, exact and slow.
"""

import inspect
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from hqc.errors import ArtefactError, EvaluationError
from hqc.integrations.diffusers.config import SiteForm
from hqc.kernels import Epilogue, Weight
from hqc.ops import nearest_timestep
from hqc.runtimes.integer.kernel_set import Kernels, reference_kernels, triton_kernels
from hqc.runtimes.integer.reference import weight_values

__all__ = ["HqcConv2d", "HqcLayer", "HqcLinear", "TimestepGrid", "current_rows", "integer_layer"]

current_rows: ContextVar[Tensor | None] = ContextVar("hqc_rows", default=None)
"""Of the denoiser that runs in this thread: the row of each sample, or one for all."""
_INT32_LIMIT = 2**31


class _Exact(nn.Module):
    """Keeps its floats float32: scales are no activations, whatever type a model is cast to."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class TimestepGrid(_Exact):
    """The calibrated timesteps of a denoiser. `grid` [T]."""

    grid: Tensor

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("grid", torch.empty(rows))

    def watch(self, denoiser: nn.Module) -> None:
        """From now on the denoiser's layers know the timestep of the call that they are in."""

        def enter(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            found = _timestep_of(module, arguments, options)
            times = torch.as_tensor(found, dtype=torch.float32, device=self.grid.device).reshape(-1)
            current_rows.set(nearest_timestep(times, self.grid))

        def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            current_rows.set(None)

        denoiser.register_forward_pre_hook(enter, with_kwargs=True)
        denoiser.register_forward_hook(leave, always_call=True)

    def check(self) -> None:
        """Raises ArtefactError unless every timestep is a number."""
        if not bool(self.grid.isfinite().all()):
            raise ArtefactError("hqc_timesteps", "has timesteps that are no numbers", "Export it again.")


def _timestep_of(denoiser: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What a call gives its denoiser as `timestep`.

    Raises:
        EvaluationError: if it gives none.
    """
    bound = inspect.signature(type(denoiser).forward).bind_partial(denoiser, *arguments, **options).arguments
    if bound.get("timestep") is None:
        raise EvaluationError("timestep", "is missing, and the scales depend on it", "Give it.")
    return bound["timestep"]


class HqcLayer(_Exact):
    """A layer of integer products.

    weight_codes: int8 [O, (kh, kw,) C], or uint8 with ⌈C/2⌉ in the place of C; weight_high: a second digit.
    weight_scale [O]. activation_scale [T]; activation_low, activation_high [T] where each row has its own ends.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    weight_high: Tensor | None
    bias: Tensor | None
    activation_scale: Tensor
    activation_low: Tensor | None
    activation_high: Tensor | None

    def __init__(self, form: SiteForm, shape: tuple[int, ...], rows: int, *, bias: bool) -> None:
        """shape: of the weight with its channels last, [O, (kh, kw,) C]."""
        super().__init__()
        self.form, self.shape = form, shape
        packed, ends = form.form == "int4", form.low is None
        stored = (*shape[:-1], -(-shape[-1] // 2)) if packed else shape
        wanted = {
            "weight_codes": torch.empty(stored, dtype=torch.uint8 if packed else torch.int8),
            "weight_high": torch.empty(shape, dtype=torch.int8) if form.form == "two digits" else None,
            "weight_scale": torch.empty(shape[0]),
            "bias": torch.empty(shape[0]) if bias else None,
            "activation_scale": torch.empty(rows),
            "activation_low": torch.empty(rows) if ends else None,
            "activation_high": torch.empty(rows) if ends else None,
        }
        for name, tensor in wanted.items():
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Weight:
        """As the kernels take it."""
        return Weight(
            self.weight_codes,
            self.weight_scale,
            self.weight_high,
            rotation=self.form.rotation,
            regular=self.form.regular,
        )

    def codes(self, rows: Tensor) -> Tensor:
        """Of an input with its channels last."""
        picked = self._rows_of(len(rows))
        inverse = self.activation_scale[picked].reciprocal()
        if self.activation_low is not None and self.activation_high is not None:
            inverse = torch.stack([inverse, self.activation_low[picked], self.activation_high[picked]], 1)
        form = self.form
        run = self._kernels(rows).hadamard_quantize
        return run(rows.contiguous(), inverse, low=form.low, high=form.high, block=form.block, regular=form.regular)

    def check(self, name: str) -> None:
        """Refuses values that no export has: kernels do not look.

        Raises:
            ArtefactError: naming the layer.
        """
        problem = self._problem()
        if problem:
            raise ArtefactError(f"layer {name[:80]}", problem, "Export it again, or do not use this folder.")

    def _problem(self) -> str:
        if missing := [name for name, tensor in self._buffers.items() if tensor is not None and tensor.is_meta]:
            return f"has no {', '.join(missing)}"
        for scale in (self.weight_scale, self.activation_scale):
            if not bool((scale.isfinite() & (scale > 0)).all()):
                return "has a scale that is not above 0"
        if self.bias is not None and not bool(self.bias.isfinite().all()):
            return "has a bias that is no number"
        low, high = self.activation_low, self.activation_high
        if low is not None and high is not None:
            whole = torch.equal(low, low.round()) and torch.equal(high, high.round())  # NaN equals nothing
            if not whole or not bool(((low >= -128) & (low < high) & (high <= 127)).all()):
                return "has activation codes outside -128…127"
        values = weight_values(self.weight, self.shape[-1])
        if self.form.rotation > 1 and int(values.abs().max()) > 127:
            return "has packed codes that leave int8 when they are rotated"
        terms = math.prod(self.shape[1:])
        if self.weight_high is not None or terms * 128 * 128 >= _INT32_LIMIT:
            reach = int(values.abs().to(torch.int64).flatten(1).sum(1).max()) * 128
            if reach >= _INT32_LIMIT:
                return f"has accumulators that may reach {reach}, past int32"
        return ""

    def _rows_of(self, samples: int) -> Tensor:
        rows = current_rows.get()
        if rows is None:
            do = "Call the denoiser that it belongs to."
            raise EvaluationError("layer", "runs outside a call of its denoiser, so there is no timestep", do)
        if len(rows) not in (1, samples):
            raise EvaluationError("timestep", f"has {len(rows)} values for {samples} samples", "Give one a sample.")
        return rows.to(self.activation_scale.device).expand(samples)

    def _epilogue(self, dtype: torch.dtype) -> Epilogue:
        return Epilogue(self.bias, dtype=dtype)

    def _scale(self, samples: int) -> Tensor:
        return self.activation_scale[self._rows_of(samples)].contiguous()

    @staticmethod
    def _kernels(x: Tensor) -> Kernels:
        return triton_kernels() if x.is_cuda else reference_kernels()

    def extra_repr(self) -> str:
        """What it prints as."""
        return f"{self.form.form} {list(self.shape)}, block={self.form.block}, rows={len(self.activation_scale)}"


class HqcLinear(HqcLayer):
    """x [N, …, C] -> [N, …, O], in x's type."""

    def codes_of(self, x: Tensor) -> Tensor:
        """The codes of x, in its layout."""
        return self.codes(x)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.codes(x)
        run = self._kernels(x).int_gemm
        return run(codes, self.weight, self._scale(len(x)), self._epilogue(x.dtype))


class HqcConv2d(HqcLayer):
    """x [N, C, H, W] -> [N, O, H', W'], in x's type."""

    def __init__(
        self, form: SiteForm, shape: tuple[int, ...], rows: int, *, bias: bool, window: dict[str, tuple[int, ...]]
    ) -> None:
        """window: stride, padding and dilation."""
        super().__init__(form, shape, rows, bias=bias)
        self.window = window

    def codes_of(self, x: Tensor) -> Tensor:
        """The codes of x, in its layout."""
        return self.codes(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.codes(x.permute(0, 2, 3, 1))
        run = self._kernels(x).int_conv2d
        y = run(codes, self.weight, self._scale(len(x)), self._epilogue(x.dtype), **self.window)
        return y.permute(0, 3, 1, 2)


def integer_layer(name: str, layer: nn.Module | None, form: SiteForm, rows: int) -> HqcLayer:
    """What takes the place of a layer.

    Raises:
        ArtefactError: for what is no layer that hqc quantises.
    """
    if isinstance(layer, nn.Linear):
        return HqcLinear(form, tuple(layer.weight.shape), rows, bias=layer.bias is not None)
    plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
    if not isinstance(layer, nn.Conv2d) or not plain or isinstance(layer.padding, str):
        found = "names no linear layer and no plain convolution of this denoiser"
        raise ArtefactError(f"quantization_config, site {name[:80]}", found, "Export it again with hqc.")
    outputs, channels, *kernel = layer.weight.shape
    window = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    return HqcConv2d(form, (outputs, *kernel, channels), rows, bias=layer.bias is not None, window=window)
