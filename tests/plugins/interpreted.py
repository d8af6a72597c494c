"""Runs in a process of its own with TRITON_INTERPRET=1: every plugin node by its kernels, as TensorRT launches them.

Prints JSON: node, tactic -> elements that differ from the definition in NumPy. All values are chosen so that no product
or sum is rounded: H of order 16 and 64 has a norm that is a power of two, and so are the scales.
"""

import importlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hqc.ops import hadamard_matrix
from hqc.plugins.hqc_qdp.nodes import OPS
from hqc.plugins.tactics import Tactic, tactics
from hqc.rotations import Rotation

INPUTS = {
    "hadamard_quantize": ["x", "inverse_scale"],
    "int_gemm": ["codes", "weight", "weight_scale", "scale", "bias"],
    "int_conv2d": ["codes", "weight", "weight_scale", "scale", "bias"],
}
"""The kernels' own names of what the nodes pass, in the nodes' order."""


def signs(order: int, regular: int) -> np.ndarray:
    return hadamard_matrix(Rotation(order, bool(regular))).numpy().astype(np.float64)


def scales(count: int) -> np.ndarray:
    """Powers of two, another for every sample or channel."""
    return (2.0 ** (np.arange(count) % 3 - 1)).astype(np.float32)


def codes_of(x: np.ndarray, inverse: np.ndarray, block: int, low: Any, high: Any, regular: int) -> np.ndarray:
    """The definition, channels last, in float64; NumPy rounds half to even. Bounds are numbers, or arrays [N, 1, …]."""
    groups = x.astype(np.float64).reshape(*x.shape[:-1], -1, block) @ signs(block, regular) / math.sqrt(block)
    levels = groups.reshape(x.shape) * inverse.reshape(-1, *[1] * (x.ndim - 1))
    return np.clip(np.round(levels), low, high).astype(np.int8)


def pack(codes: np.ndarray) -> np.ndarray:
    """Two four-bit codes a byte, the first in the low nibble."""
    nibbles = codes.astype(np.uint8) & 15
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).view(np.int8)


def rotate(weight: np.ndarray, block: int, regular: int) -> np.ndarray:
    """W·H in integers; weights [O, K], blocks along K."""
    return (weight.reshape(len(weight), -1, block) @ signs(block, regular)).reshape(weight.shape)


def run(tactic: Tactic, launch: Any, tensors: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """The kernel as TensorRT launches it: inputs in the node's order, integers, output."""
    options = tactic.options
    parameters = options.parameters(tactic.dtype)
    named = [p.name for p in parameters if p.role == "input"]
    assert named == INPUTS[tactic.kernel], named
    assert [p.role for p in parameters] == ["input"] * len(tensors) + ["int32"] * len(launch.integers) + ["output"]
    if getattr(options, "form", "") == "words":
        tensors = [tensors[0], tensors[1].view(torch.int32), *tensors[2:]]
    arguments = {f"{name}_ptr": tensor for name, tensor in zip(named, tensors, strict=True)}
    integers = (p.name for p in parameters if p.role == "int32")
    arguments |= dict(zip(integers, launch.integers, strict=True))
    arguments[f"{parameters[-1].name}_ptr"] = out
    kernel = getattr(importlib.import_module(f"hqc.kernels.jit.{tactic.kernel}"), options.function)
    kernel[launch.grid](**arguments, **options.constants(), num_warps=options.num_warps)


def ceil_div(size: int, divisor: int) -> int:
    return -(-size // divisor)


def compare(
    op: str,
    inputs: Sequence[torch.Tensor],
    attributes: dict[str, int],
    index: int,
    out: torch.Tensor,
    wanted: np.ndarray,
) -> list[int]:
    """Elements that differ, a tactic each; inputs in the node's order and sizes, `out` poisoned before each."""
    kinds = {torch.float16: "fp16", torch.float32: "fp32", torch.int8: "int8"}
    dims = [tuple(tensor.shape) for tensor in inputs]
    choice = OPS[op].choices(dims, kinds[inputs[0].dtype], attributes)[index]
    places = math.prod(dims[0][2:] if len(dims[0]) == 4 else dims[0][1:-1])
    memory = [_laid_out(tensor, layout) for tensor, layout in zip(inputs, choice.formats, strict=False)]
    wrong = []
    for tactic in tactics(choice.variant, [places]):
        out.fill_(77)
        run(tactic, choice.variant.launch(dims[0], tactic.tile, ceil_div), memory, out)
        wrong.append(int((out.numpy() != wanted).sum()))
    return wrong


def _laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """As the format lies in memory."""
    return tensor.permute(0, 2, 3, 1).contiguous() if layout.startswith("HWC") else tensor.contiguous()


def main() -> None:
    rng = np.random.default_rng(3)
    found = {}
    for regular, kind in enumerate(("", ", regular")):
        found |= {f"{name}{kind}": wrong for name, wrong in _nodes(rng, regular).items()}
    print(json.dumps(found))


def _nodes(rng: np.random.Generator, regular: int) -> dict[str, list[int]]:
    found = {}
    # x in eighths up to ±8: codes reach both bounds, and levels fall on halves.
    image = (rng.integers(-64, 65, (3, 64, 5, 6)) / 8).astype(np.float16)
    inverse = scales(3)
    for index, name in enumerate(("image", "image, channels last")):
        attributes = {"block": 16, "low": -7, "high": 7, "channel_axis": 1, "regular": regular}
        wanted = codes_of(image.transpose(0, 2, 3, 1), inverse, 16, -7, 7, regular)
        assert {-7, 7} <= set(wanted.flat)
        tensors = [torch.from_numpy(image), torch.from_numpy(inverse)]
        out = torch.empty(wanted.shape, dtype=torch.int8)
        found[name] = compare("HadamardQuantize", tensors, attributes, index, out, wanted)
    tokens = (rng.integers(-64, 65, (3, 7, 192)) / 8).astype(np.float32)
    attributes = {"block": 64, "low": -127, "high": 127, "channel_axis": -1, "regular": regular}
    wanted = codes_of(tokens, inverse, 64, -127, 127, regular)
    tensors = [torch.from_numpy(tokens), torch.from_numpy(inverse)]
    out = torch.empty(wanted.shape, dtype=torch.int8)
    found["tokens"] = compare("HadamardQuantize", tensors, attributes, 0, out, wanted)

    found |= _bounded(rng, regular)

    codes, weight = rng.integers(-7, 8, (3, 7, 64), np.int8), rng.integers(-1, 2, (24, 64), np.int8)
    scale_w, scale_a, bias = scales(24), scales(3), rng.integers(-9, 10, 24).astype(np.float32)
    products = codes.astype(np.float64) @ rotate(weight, 16, regular).T
    exact = products * scale_w * scale_a[:, None, None] + bias
    operands = [torch.from_numpy(a) for a in (pack(weight), scale_w, scale_a, bias)]
    assert (exact == exact.astype(np.float16)).all()
    out = torch.empty(exact.shape, dtype=torch.float16)
    attributes = {"block": 16, "out_type": 10, "regular": regular}
    found["linear"] = compare("Int4Linear", [torch.from_numpy(codes), *operands], attributes, 0, out, exact)

    for stride in (1, 2):
        found[f"conv, stride {stride}"] = _conv(rng, stride, regular)
    return found


def _bounded(rng: np.random.Generator, regular: int) -> dict[str, list[int]]:
    """Every sample has bounds of its own; one ends at 0, and one holds no negative code."""
    found, step = {}, np.stack([scales(3), np.array([-15, -3, 0]), np.array([0, 12, 15])], 1, dtype=np.float32)
    image = (rng.integers(-64, 65, (3, 64, 5, 6)) * 3 / 8).astype(np.float16)
    tokens = (rng.integers(-64, 65, (3, 7, 192)) * 3 / 8).astype(np.float32)
    last = {"image, bounded": image.transpose(0, 2, 3, 1), "tokens, bounded": tokens}
    last["image, bounded, channels last"] = last["image, bounded"]
    for name, values in last.items():
        bounds = (column.reshape(-1, *[1] * (values.ndim - 1)) for column in step.T[1:])
        block = 64 if values is tokens else 16
        wanted = codes_of(values, step[:, 0], block, *bounds, regular)
        spans = [(codes.min(), codes.max()) for codes in wanted]
        assert spans == [(-15, 0), (-3, 12), (0, 15)], spans
        attributes = {"block": block, "channel_axis": -1 if values is tokens else 1, "regular": regular}
        tensors = [torch.from_numpy(tokens if values is tokens else image), torch.from_numpy(step)]
        out = torch.empty(wanted.shape, dtype=torch.int8)
        index = int(name.endswith("last"))
        found[name] = compare("HadamardQuantizeBounded", tensors, attributes, index, out, wanted)
    return found


def _conv(rng: np.random.Generator, stride: int, regular: int) -> list[int]:
    codes, weight = rng.integers(-7, 8, (2, 32, 5, 6), np.int8), rng.integers(-1, 2, (24, 3, 3, 32), np.int8)
    rotated = rotate(weight.reshape(24, -1), 16, regular).reshape(24, 3, 3, 32).transpose(0, 3, 1, 2)
    product = torch.nn.functional.conv2d(
        torch.from_numpy(codes).double(), torch.from_numpy(rotated.copy()), stride=stride, padding=1
    )
    scale_w, scale_a, bias = scales(24), scales(2), rng.integers(-9, 10, 24).astype(np.float32)
    exact = product.numpy().transpose(0, 2, 3, 1) * scale_w * scale_a[:, None, None, None] + bias
    operands = [torch.from_numpy(a) for a in (pack(weight.reshape(24, -1)), scale_w, scale_a, bias)]
    assert (exact == exact.astype(np.float16)).all()
    out = torch.empty(exact.shape, dtype=torch.float16)
    attributes = {"block": 16, "kernel": 3, "stride": stride, "padding": 1, "out_type": 10, "regular": regular}
    return compare("Int4Conv", [torch.from_numpy(codes), *operands], attributes, 0, out, exact)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
