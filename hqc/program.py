"""`Program`: the one value that flows through hqc. A captured graph, its weights, its plan and its history.

The graph is a plain `torch.fx.Graph` over ATen and `hqc::` operators: placeholders are the user inputs (sample,
timestep, and the conditions by name), weights are `get_attr` nodes named by their fully qualified names, and every
weighted layer carries its stable site name in `node.meta["site"]`. Calls keep the path of the module that made them,
`node.meta["scope"]`, the layer's own for what passes insert at a site. Nothing here is changed in place: a pass returns
a new Program.
"""

import copy
import hashlib
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, fx, nn

import hqc.ops  # noqa: F401  (registers the operators)
from hqc.plan import QuantPlan
from hqc.styles.record import Style

__all__ = ["InputSpec", "Origin", "PassRecord", "Program", "Stage", "digest_of", "is_op"]

BATCH = "N"
INPUT_DTYPES = ("float32", "int64")
_LARGEST = 2**31
aten = torch.ops.aten


class Stage(StrEnum):
    """How far a program has come."""

    CAPTURED = "captured"
    QUANTISED = "quantised"
    TRAINED = "trained"
    INTEGER = "integer"


@dataclass(frozen=True)
class InputSpec:
    """One input: its name, its shape with "N" for the batch (none for what a whole batch shares), its dtype.

    span: (low, high) of the values that make sense, high excluded: labels of an embedding, 0 and 1 of a mask, the
    timesteps of a flow model. None: any number, or for `timestep` 0…999. default: what runtimes take where a caller
    gives none; None: it must be given.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    span: tuple[float, float] | None = None
    default: float | None = None

    def example(self, batch: int, generator: torch.Generator) -> Tensor:
        """A random input of this shape: uniform in its span (whole numbers for integers), or normal without one."""
        shape = [batch if d == BATCH else int(d) for d in self.shape]
        dtype = getattr(torch, self.dtype)
        if self.span is None and self.name == "timestep":
            return torch.randint(0, 1000, shape, generator=generator).to(dtype)
        if not dtype.is_floating_point:
            low, high = self.span or (0, 2)
            return torch.randint(int(low), int(high), shape, generator=generator).to(dtype)
        if self.span is None:
            return torch.randn(shape, generator=generator).to(dtype)
        low, high = self.span
        return torch.empty(shape).uniform_(low, high, generator=generator).to(dtype)

    @property
    def batched(self) -> bool:
        """Whether every sample has a value of its own."""
        return BATCH in self.shape

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "InputSpec":
        """Reads what `dataclasses.asdict` gives.

        Raises:
            KeyError, TypeError, ValueError: if it is not an input that a program may have.
        """
        name, shape, dtype, span = data["name"], tuple(data["shape"]), data["dtype"], data.get("span")
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"an input is called {str(name)[:40]!r}")
        if not 0 < len(shape) <= 8 or not all(d == BATCH or (type(d) is int and 0 < d < _LARGEST) for d in shape):
            raise ValueError(f"input {data['name']!r} has shape {list(shape)}")
        if dtype not in INPUT_DTYPES:
            raise ValueError(f"input {data['name']!r} is {dtype!r}; expected {' or '.join(INPUT_DTYPES)}")
        if span is not None:
            low, high = (float(v) for v in span)
            if not -_LARGEST < low < high < _LARGEST or (dtype == "int64" and not int(low) < int(high)):
                raise ValueError(f"input {data['name']!r} has span {list(span)}")
            span = (low, high)
        default = data.get("default")
        if default is not None and (type(default) not in (int, float) or not math.isfinite(default)):
            raise ValueError(f"input {data['name']!r} has a default that is no number")
        return InputSpec(name, shape, dtype, span, default)


@dataclass(frozen=True)
class Origin:
    """Where a program came from: enough to find the source again and to rebuild the pipeline around it."""

    source: str = ""
    revision: str = ""
    kind: str = "module"
    pipeline: str = ""
    unet_config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    capture_error: float = 0.0

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Origin":
        """Reads what `dataclasses.asdict` gives.

        Raises:
            TypeError, ValueError: if a field is unknown or of the wrong type.
        """
        origin = Origin(**data)
        texts = (origin.source, origin.revision, origin.kind, origin.pipeline)
        if not all(isinstance(text, str) and "\0" not in text for text in texts):
            raise ValueError("a field of the origin is no text")
        if not isinstance(origin.versions, dict) or not all(isinstance(v, str) for v in origin.versions.values()):
            raise ValueError("the origin's versions are no texts")
        if not isinstance(origin.capture_error, (int, float)) or not math.isfinite(origin.capture_error):
            raise ValueError("the origin's capture_error is no number")
        if not isinstance(origin.unet_config, dict):
            raise ValueError("the origin's unet_config is no mapping")
        if wrong := [key for key in _SIZES if not _are_sizes(origin.unet_config.get(key))]:
            raise ValueError(f"the origin's unet_config has no size as {wrong[0]}")
        return origin


# What is computed with, of the many fields that a denoiser's configuration has.
_SIZES = (
    *("sample_size", "in_channels", "out_channels", "patch_size", "block_out_channels", "layers_per_block"),
    *("projection_class_embeddings_input_dim", "num_class_embeds", "num_embeds_ada_norm", "cross_attention_dim"),
)
_LARGEST_SIZE = 2**20


def _are_sizes(value: Any) -> bool:
    """A positive number, some of them, or nothing."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return value is None or all(type(number) is int and 0 < number < _LARGEST_SIZE for number in numbers)


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: its text, what it touched, what it missed with the reason, its time, the sites that went."""

    text: str
    touched: tuple[str, ...]
    missed: tuple[tuple[str, str], ...]
    seconds: float
    removed: tuple[str, ...] = ()

    def __str__(self) -> str:
        removed = f"{len(self.removed)} removed, " if self.removed else ""
        lines = [f"{self.text}: {len(self.touched)} sites, {len(self.missed)} missed, {removed}{self.seconds:.2f} s"]
        lines += [f"  missed {site}: {reason}" for site, reason in self.missed]
        lines += [f"  removed {site}" for site in self.removed]
        return "\n".join(lines)


@dataclass(frozen=True)
class Program:
    """A denoiser as data: graph, weights by name, plan, stage, history, origin. Frozen; passes return new ones.

    styles: LoRAs from files that were merged into it or attached to it.
    """

    graph: fx.Graph
    state: Mapping[str, Tensor]
    inputs: tuple[InputSpec, ...]
    stage: Stage = Stage.CAPTURED
    plan: QuantPlan = field(default_factory=QuantPlan)
    history: tuple[PassRecord, ...] = ()
    origin: Origin = field(default_factory=Origin)
    styles: tuple[Style, ...] = ()

    def module(self) -> fx.GraphModule:
        """A callable module over the same weights (no copies); float weights are Parameters without gradient."""
        root = nn.Module()
        for name, tensor in self.state.items():
            _put(root, name, tensor)
        return fx.GraphModule(root, copy_graph(self.graph), "Program")

    def sites(self) -> Iterator[tuple[str, fx.Node]]:
        """(site name, layer node) in graph order."""
        for node in self.graph.nodes:
            if node.meta.get("role") == "layer":
                yield node.meta["site"], node

    def example_inputs(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Fixed random inputs; the timesteps of a batch differ from each other."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(spec.example(batch, generator) for spec in self.inputs)

    @property
    def has_timestep(self) -> bool:
        """Whether it is given a timestep: a denoiser is, the halves of an autoencoder are not."""
        return any(spec.name == "timestep" for spec in self.inputs)

    @property
    def attached_styles(self) -> tuple[str, ...]:
        """The names of LoRAs whose scale is an input."""
        return tuple(style.name for style in self.styles if not style.merged)

    def evolve(self, **changes: Any) -> "Program":
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def size_bytes(self) -> int:
        """Bytes of all tensors in the state."""
        return sum(t.numel() * t.element_size() for t in self.state.values())


def _put(root: nn.Module, name: str, tensor: Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if tensor.is_floating_point():
        root.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        root.register_buffer(leaf, tensor)


def digest_of(program: Program) -> bytes:
    """Sha256 of what a program computes: its graph, its plan, and the bits of its tensors."""
    digest = hashlib.sha256(repr((str(program.graph), program.plan)).encode())
    for name in sorted(program.state):
        digest.update(name.encode())
        digest.update(program.state[name].reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes can be rewritten; names, order and meta are kept."""
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = new.node_copy(node, mapping.__getitem__)
        mapping[node].meta = copy.copy(node.meta)
        if mapping[node].name != node.name:
            mapping[node].name = node.name
    return new


def is_op(node: object, *targets: Any) -> bool:
    """Whether a node calls one of the operator overloads."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


ALLOWED_FUNCTIONS: Mapping[str, Any] = {
    f"operator.{name}": getattr(operator, name)
    for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ge", "gt", "le", "lt")
} | {f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_float", "sym_int")}
"""Python functions that a graph may call besides ATen and hqc operators: arithmetic on sizes."""
