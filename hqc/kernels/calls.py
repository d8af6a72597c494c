"""Calls of the integer products as values: recorded while a module runs, made again with other numbers.

What is recorded are shapes and options, no data, so that a call can be timed alone in every tile.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hqc.kernels.operands import Weight
from hqc.kernels.products import Product
from hqc.kernels.tuning import watch

__all__ = ["Call", "Recorder", "Work"]

_LARGE = ("inverse_scale",)
"""Operands that are about a hundred, so that codes differ; all other floats are about a hundredth."""
_NIBBLES = (0x00, 0x01, 0x0F, 0x10, 0x11, 0x1F, 0xF0, 0xF1, 0xFF)
"""Two codes of -1…1 a byte: their rotations stay within int8."""


@dataclass(frozen=True)
class _Spec:
    """A tensor without its numbers."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device) -> Tensor:
        return self._base(device).expand(self.shape)

    def random(self, device: torch.device, generator: torch.Generator) -> Tensor:
        base = self._base(device)
        if self.dtype == torch.uint8:
            table = torch.tensor(_NIBBLES, dtype=torch.uint8, device=device)
            base.copy_(table[torch.randint(len(_NIBBLES), base.shape, generator=generator, device=device)])
        elif self.dtype == torch.int8:
            base.random_(-7, 8, generator=generator)
        elif self.dtype.is_floating_point:
            low = 50.0 if self.name in _LARGE else 0.005
            base.uniform_(low, 3 * low, generator=generator)
        else:
            base.zero_()
        return base.expand(self.shape)

    def _base(self, device: torch.device) -> Tensor:
        """Without the axes that only repeat."""
        shape = [1 if stride == 0 else size for size, stride in zip(self.shape, self.stride, strict=True)]
        return torch.empty_strided(shape, self.stride, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Call:
    """A function of `hqc.kernels` with its arguments, tensors as shapes."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """Of arguments that are there."""

        def spec(name: str, tensor: Tensor) -> _Spec:
            return _Spec(name, tuple(tensor.shape), tensor.stride(), tensor.dtype)

        return cls(function, _mapped(args, Tensor, spec), _mapped(kwargs, Tensor, spec))

    def key(self) -> str:
        """Equal for calls of equal shapes and options."""
        return repr((self.function.__name__, self.args, self.kwargs))

    def empty(self, device: torch.device) -> "Call":
        """With tensors of any numbers."""
        return self._with(lambda _, spec: spec.empty(device))

    def random(self, device: torch.device, seed: int = 0) -> "Call":
        """With numbers for which no sum overflows."""
        generator = torch.Generator(device).manual_seed(seed)
        return self._with(lambda _, spec: spec.random(device, generator))

    def run(self) -> Any:
        """The function's result; the call must have tensors."""
        return self.function(*self.args, **self.kwargs)

    def weight_bytes(self) -> int:
        """Of the weight's codes; the call must have tensors."""
        found: list[int] = []
        _mapped((self.args, self.kwargs), Weight, lambda _, w: found.append(_size(w.codes) + _size(w.high)))
        return sum(found)

    def with_other_weight(self) -> "Call":
        """The same with a copy of the weight; the call must have tensors."""

        def copied(_: str, weight: Weight) -> Weight:
            return replace(
                weight, codes=weight.codes.clone(), high=None if weight.high is None else weight.high.clone()
            )

        return Call(self.function, _mapped(self.args, Weight, copied), _mapped(self.kwargs, Weight, copied))

    def _with(self, made: Callable[[str, _Spec], Tensor]) -> "Call":
        return Call(self.function, _mapped(self.args, _Spec, made), _mapped(self.kwargs, _Spec, made))


def _size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _mapped(value: Any, kind: type, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """The value with everything of a kind changed, within tuples, lists, dicts and dataclasses."""
    if isinstance(value, kind):
        return change(name, value)
    if isinstance(value, tuple | list):
        return type(value)(_mapped(item, kind, change, name) for item in value)
    if isinstance(value, dict):
        return {key: _mapped(item, kind, change, str(key)) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _mapped(getattr(value, f.name), kind, change, f.name) for f in fields(value)})
    return value


@dataclass(frozen=True)
class Work:
    """A product of a module: a call that computes it, how often the module does, and what its tiles must obey."""

    product: Product
    call: Call
    count: int
    limits: tuple[tuple[int, bool], ...]


class Recorder:
    """Notes the products of the functions that it wraps."""

    def __init__(self) -> None:
        self._calls: dict[Product, Counter[str]] = {}
        self._limits: dict[Product, dict[tuple[int, bool], None]] = {}
        self._known: dict[str, Call] = {}

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, noting what it is called with."""

        def recorded(*args: Any, **kwargs: Any) -> Any:
            def note(product: Product, whole_rows: int, unsplit: bool) -> None:
                call = Call.of(function, args, kwargs)
                self._known.setdefault(call.key(), call)
                self._calls.setdefault(product, Counter())[call.key()] += 1
                self._limits.setdefault(product, {})[whole_rows, unsplit] = None

            with watch(note):
                return function(*args, **kwargs)

        return recorded

    def work(self) -> list[Work]:
        """Every product once, computed by the call that is the most frequent."""
        return [
            Work(product, self._known[calls.most_common(1)[0][0]], calls.total(), tuple(self._limits[product]))
            for product, calls in self._calls.items()
        ]
