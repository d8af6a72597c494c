"""The layers of an engine, read from the builder's own text; and whether quantised products run on INT8 inputs.

Both builders describe an engine, built with detailed profiling, in one line a kernel (TensorRT-RTX in its log, TensorRT
through its inspector):

    Layers:
    Name: conv1/Conv_myl0_4, LayerType: correlation, Inputs: [ { Name: q, Dimensions: [-1,64,8,8], …, Datatype: Int8,
    Format: (NHWC) … }], Constants: […], Outputs: […], …, Metadata: [ONNX Layer: conv1/Conv][ONNX Layer: …]

The metadata names the ONNX nodes that the kernel computes, so a kernel is matched with nodes by name, not by guess.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hqc.engines.network import Product, site_of
from hqc.errors import ExportError

__all__ = ["Coverage", "EngineLayer", "LayerTensor", "coverage", "engine_layers"]

INT8 = "Int8"
_ELEMENTWISE = "kgen"
"""The kind of kernels that TensorRT generates: scales, casts, moves."""

_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), (?P<fields>.*?) ?\}(?=, \{ Name: |$)")
_HEAD = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), ")
_LISTS = ("Inputs", "Constants", "Outputs")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\[\x1e\x1f]|\s*$)")
"""Entries are separated by a control character, or by nothing."""
_TYPES = {"FP32": "Float", "FP16": "Half", "BF16": "BFloat16", "INT8": "Int8", "INT32": "Int32", "INT64": "Int64"}
"""Names of types in formats such as "Row major linear FP32", as the other form has them."""


@dataclass(frozen=True)
class LayerTensor:
    """What a kernel reads or writes."""

    name: str
    dtype: str
    format: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        """For the report: `Int8 NHWC [-1,64,8,8]`."""
        return f"{self.dtype} {self.format} [{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class EngineLayer:
    """One kernel of an engine, the ONNX nodes that it computes and the sites that they belong to."""

    name: str
    kind: str
    inputs: tuple[LayerTensor, ...]
    constants: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    nodes: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, tensors in their text form."""
        return {
            "name": self.name,
            "kind": self.kind,
            "sites": list(self.sites),
            "inputs": list(map(str, self.inputs)),
            "constants": list(map(str, self.constants)),
            "outputs": list(map(str, self.outputs)),
            "nodes": list(self.nodes),
        }


def engine_layers(text: str, sites: Sequence[str] = (), products: Sequence[Product] = ()) -> tuple[EngineLayer, ...]:
    """Layers in the order in which the engine runs them.

    A node belongs to the site that its name starts with, a product to that of its weight.

    Raises:
        ExportError: if the text holds no layer list, or one in another form.
    """
    found = re.search(r"^Layers:\n(?!\s)(.+?)(\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ExportError(
            "the builder's layer list", "is missing", "Take a builder version that docs/tensorrt.md names."
        )
    # Not splitlines: a control character between two nodes would end a line.
    lines = [line.strip() for line in found[1].split("\n") if line.strip()]
    known = {product.node: site_of(product.weight, sites) for product in products}
    return tuple(_layer(line, lambda node: known.get(node) or site_of(node, sites)) for line in lines)


def _layer(line: str, site: Callable[[str], str]) -> EngineLayer:
    head = _HEAD.match(line)
    if head is None:
        raise ExportError(
            "the builder's layer list",
            f"has a line that hqc cannot read: {line[:80]!r}",
            "Take a builder version that docs/tensorrt.md names.",
        )
    inputs, constants, outputs = (tuple(_tensors(line, which)) for which in _LISTS)
    nodes = tuple(_NODE.findall(line.rpartition("Metadata: ")[2]))
    sites = tuple(filter(None, dict.fromkeys(map(site, nodes))))
    return EngineLayer(head["name"], head["kind"], inputs, constants, outputs, nodes, sites)


def _tensors(line: str, which: str) -> Iterator[LayerTensor]:
    found = re.search(rf"\b{which}: \[ (\{{.*?\}})\](?=, [A-Z]\w+: |$)", line)
    for tensor in _TENSOR.finditer(found[1] if found else ""):
        fields = tensor["fields"]
        shape = re.search(r"Dimensions: \[([-\d,]*)\]", fields)
        dtype, layout = _type_and_format(fields)
        yield LayerTensor(
            tensor["name"], dtype, layout, tuple(int(d) for d in shape[1].split(",") if d) if shape else ()
        )


def _type_and_format(fields: str) -> tuple[str, str]:
    """("Int8", "NHWC") of "Datatype: Int8, Format: (NHWC) Channel major format", or of "Format/Datatype: …"."""
    if joint := re.search(r"Format/Datatype: (.*)$", fields):
        named = next((name for word, name in _TYPES.items() if word in joint[1].upper()), "unknown")
        return named, joint[1].strip()
    dtype = re.search(r"Datatype: (\w+)", fields)
    layout = re.search(r"Format: (?:\(([^)]*)\))?(.*)$", fields)
    return dtype[1] if dtype else "unknown", (layout[1] or layout[2].strip()) if layout else "unknown"


@dataclass(frozen=True)
class Coverage:
    """How the products of the ONNX file came out whose weights are codes.

    products: those whose activations are codes too; int8: how many of them have a kernel that reads INT8 on both sides,
    which hqc's plugins for packed 4-bit weights do: a byte holds two.
    exceptions: (weight, why) of each of the others.
    weight_only: (weight, what its kernel reads) of each whose activations are float.
    """

    products: int
    int8: int
    exceptions: tuple[tuple[str, str], ...] = ()
    weight_only: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "quantised_products": self.products,
            "int8": self.int8,
            "exceptions": dict(self.exceptions),
            "weight_only": dict(self.weight_only),
        }


def coverage(layers: Iterable[EngineLayer], products: Sequence[Product]) -> Coverage:
    """Whether the kernel of every quantised product reads INT8 activations and INT8 weights."""
    by_node: dict[str, list[EngineLayer]] = {}
    for layer in layers:
        for node in layer.nodes:
            by_node.setdefault(node, []).append(layer)
    quantised = [(p.weight, by_node.get(p.node, [])) for p in products if p.activations != "float"]
    others = [(p.weight, by_node.get(p.node, [])) for p in products if p.activations == "float"]
    exceptions = tuple((name, _reads(kernels)) for name, kernels in quantised if not any(map(_reads_int8, kernels)))
    weight_only = tuple((name, _reads(kernels)) for name, kernels in others)
    return Coverage(len(quantised), len(quantised) - len(exceptions), exceptions, weight_only)


def _reads(kernels: Sequence[EngineLayer]) -> str:
    """What the kernel of a product reads: the first that is not made of elementwise parts around it."""
    if not kernels:
        return "no kernel names it"
    kernel = next((kernel for kernel in kernels if kernel.kind != _ELEMENTWISE), kernels[-1])
    types = ", ".join(tensor.dtype for tensor in (*kernel.inputs, *kernel.constants)) or "nothing"
    return f"{kernel.kind} kernel {kernel.name} reads {types}"


def _reads_int8(kernel: EngineLayer) -> bool:
    activations = sum(tensor.dtype == INT8 for tensor in kernel.inputs)
    weights = sum(tensor.dtype == INT8 for tensor in kernel.constants)
    plugin = kernel.kind.startswith("Plugin")  # its weights may be listed or not
    return activations >= 1 and (plugin or activations + weights >= 2)
