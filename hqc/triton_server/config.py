"""config.pbtxt: what Triton Inference Server is told of a model, as protobuf's text format.

With a `max_batch_size` above 0 every input and output has a batch dimension in front, which `dims` leave out, and
`dims` may not be empty: an input [N] is `dims: [1]` with a `reshape` to nothing. A model with an input or output
without a batch dimension has `max_batch_size: 0`, full shapes, and no dynamic batching.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Union

__all__ = ["DTYPES", "ModelConfig", "Platform", "Port"]

Platform = Literal["onnxruntime_onnx", "tensorrt_plan"]

DTYPES: Mapping[str, str] = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "half": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "bf16": "TYPE_BF16",
    "float": "TYPE_FP32",
}
"""Types as ONNX and TensorRT name them -> Triton's."""

_ANY = -1
_BACKENDS: Mapping[Platform, str] = {"onnxruntime_onnx": "onnxruntime", "tensorrt_plan": "tensorrt"}


class _Word(str):
    """A value of an enumeration, which is written without quotes."""


_Value = Union[str, int, Sequence[int], "_Message"]


@dataclass(frozen=True)
class _Message:
    """Fields in order; a name may come several times."""

    fields: "tuple[tuple[str, _Value], ...]"


@dataclass(frozen=True)
class Port:
    """An input or an output: its name, its type as Triton calls it, its shape, None where a size is free."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    @property
    def batched(self) -> bool:
        """Whether its first dimension is the batch."""
        return bool(self.shape) and self.shape[0] is None

    def message(self, *, batched: bool) -> _Message:
        """As ModelInput or ModelOutput. batched: without the batch dimension."""
        sizes = [_ANY if size is None else size for size in (self.shape[1:] if batched else self.shape)]
        fields: list[tuple[str, _Value]] = [("name", self.name), ("data_type", _Word(self.dtype))]
        fields.append(("dims", sizes or [1]))
        if not sizes:
            fields.append(("reshape", _Message((("shape", sizes),))))
        return _Message(tuple(fields))


@dataclass(frozen=True)
class ModelConfig:
    """A model as Triton takes it.

    max_batch: samples that Triton may put into one call; 0 for a model with an input without a batch dimension.
    plans: compute capability ("8.6") -> file, of a model with a plan for each; none: the one file has the usual name.
    """

    name: str
    platform: Platform
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    max_batch: int
    gpu: bool
    plans: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The file."""
        batched = self.max_batch > 0
        fields: list[tuple[str, _Value]] = [
            ("name", self.name),
            ("platform", self.platform),
            ("backend", _BACKENDS[self.platform]),
            ("max_batch_size", self.max_batch),
            *(("input", port.message(batched=batched)) for port in self.inputs),
            *(("output", port.message(batched=batched)) for port in self.outputs),
        ]
        if batched:
            fields.append(("dynamic_batching", _Message(())))
        kind = _Word("KIND_GPU" if self.gpu else "KIND_CPU")
        fields.append(("instance_group", _Message((("count", 1), ("kind", kind)))))
        for capability, file in self.plans.items():
            fields.append(("cc_model_filenames", _Message((("key", capability), ("value", file)))))
        return "".join(f"{line}\n" for line in _lines(fields))


def _lines(fields: Sequence[tuple[str, _Value]]) -> list[str]:
    found = []
    for name, value in fields:
        if isinstance(value, _Message):
            inside = [f"  {line}" for line in _lines(value.fields)]
            found += [f"{name} {{", *inside, "}"]
        else:
            found.append(f"{name}: {_scalar(value)}")
    return found


def _scalar(value: str | int | Sequence[int]) -> str:
    if isinstance(value, _Word):
        return str(value)
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, int):
        return str(value)
    return f"[{', '.join(map(str, value))}]"


def _quoted(text: str) -> str:
    """As the text format quotes: what is no printable ASCII is its UTF-8 bytes in octal."""
    plain = (chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\' else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(plain)}"'
