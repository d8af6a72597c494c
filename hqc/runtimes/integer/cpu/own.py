"""Products by `products.cpp`, for what oneDNN's operators are slow at.

What they do before they begin takes longer than a small product; without VNNI their sums saturate, so that one product
becomes two. Here codes of at most `reach` are read as 0 … 2·reach, and as many sums of two products as int16 surely
holds are added there before they are widened.
"""

import ctypes
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hqc.kernels import Epilogue
from hqc.runtimes.integer.cpu import steps
from hqc.runtimes.integer.cpu.operators import INT16_LIMIT, ZERO, Window, output_size
from hqc.runtimes.integer.cpu.steps import address, run_step, whole_numbers

__all__ = ["OwnProduct", "OwnProducts"]

_LANES, _WIDE, _QUAD = 16, 32, 4
_POINT: Window = ((1, 1), (0, 0), (1, 1))


class OwnProducts:
    """Of one library."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        """functions: of `compiler.compiled_passes`; `there` says whether it has products for this CPU."""
        self.functions = steps.load_steps(functions)

    @cached_property
    def there(self) -> bool:
        """Whether there are any."""
        return bool(self.functions.hqc_has_products())

    @cached_property
    def in_int16(self) -> bool:
        """Whether two neighbours are added in int16: a CPU without VNNI."""
        return int(self.functions.hqc_has_products()) == 1

    def group(self, reach: int, weight: Tensor) -> int:
        """How many sums of two products int16 holds, for codes up to `reach`; 0: not one. 1 for sums in int32."""
        if not self.in_int16:
            return 1
        low, high = (int(bound) for bound in weight.aminmax())
        return INT16_LIMIT // (2 * min(2 * reach, 255) * max(-low, high, 1))

    def zero(self, reach: int) -> int:
        """What is taken off a stored code before it is multiplied."""
        return max(ZERO - reach, 0) if self.in_int16 else 0

    def pack(self, weight: Tensor, scale: Tensor, reach: int, window: Window | None) -> "OwnProduct":
        """The product of codes of at most `reach` with a weight [O, C] or [O, h, w, C] and its scale [O]."""
        return OwnProduct(self, weight, scale, reach, window or _POINT)


class OwnProduct:
    """One weight, in the order in which it is read."""

    def __init__(self, products: OwnProducts, weight: Tensor, scale: Tensor, reach: int, window: Window) -> None:
        outputs, *places, channels = weight.shape
        self._kernel = tuple(places) if len(places) == 2 else (1, 1)
        self._functions, self._scale, self._window = products.functions, scale.contiguous(), window
        self._zero, self._group = products.zero(reach), products.group(reach, weight)
        sums = weight.flatten(1).numpy().sum(1, dtype=np.int32)  # a sixteenth of the time that torch's takes
        self._offset = torch.from_numpy(sums).mul_(ZERO - self._zero)
        flat = weight.reshape(outputs, -1)
        rows = functional.pad(flat, (0, -flat.shape[1] % _QUAD, 0, -outputs % _WIDE))
        quads = rows.view(torch.int32).view(-1, _LANES, rows.shape[1] // _QUAD)
        self._weight = quads.transpose(1, 2).contiguous()
        self._outputs, self._channels = outputs, channels

    def __call__(
        self, codes: Tensor, factor: Tensor, epilogue: Epilogue, *, into: Tensor | None = None, upsample: int = 1
    ) -> Tensor:
        """codes u8 [N, …, C], factor fp32 [N] -> float32 [N, …, O], or `into` with it added; residual as that."""
        samples, *places = codes.shape[:-1]
        image = len(places) == 2
        height, width = places if image else (1, codes.numel() // (samples * self._channels))
        size = output_size((height * upsample, width * upsample), self._kernel, self._window)
        shape = (samples, *(size if image else places), self._outputs)
        y = torch.empty(shape, device=codes.device) if into is None else into
        codes, shift = codes.contiguous(), epilogue.shift
        shift = shift if shift is None or shift.stride(-1) == 1 else shift.contiguous()
        pointers = (codes, self._weight, self._offset, self._scale, factor, epilogue.bias, shift, epilogue.residual, y)
        pitches = (_pitch(factor), 0 if shift is None else _pitch(shift))
        fields = steps.Product(
            *map(address, pointers),
            *pitches,
            *(samples, height, width, self._channels, self._outputs),
            *map(whole_numbers, (self._kernel, *self._window, size)),
            *(upsample, self._zero, self._group, int(into is not None), int(epilogue.silu)),
        )
        run_step(self._functions, fields)
        return y


def _pitch(tensor: Tensor) -> int:
    """Numbers from one sample to the next; 0 where one is for all."""
    return tensor.stride(0) if len(tensor) > 1 else 0
