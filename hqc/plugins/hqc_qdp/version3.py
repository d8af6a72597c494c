"""The plugins as IPluginV3, for TensorRT 10.0 to 10.8, whose parser takes no plugin ahead of time.

The same PTX, launched from Python while the engine runs: whoever loads such an engine calls `register` first. A launch
costs some Python; replayed from a CUDA graph it costs none.

Importing this defines the classes; `register_creators` puts their creators into TensorRT's registry.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorrt as trt

from .current import CURRENT
from .driver import load_kernel
from .nodes import OPS, Choice, Op
from .problems import PluginError
from .table import Kernel
from .trt_types import DTYPES, NAMES, NAMESPACE, VERSION

__all__ = ["HqcCreator", "HqcPlugin", "register_creators"]

_CREATORS: list[Any] = []
"""TensorRT's registry does not own them."""


class HqcPlugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc]
    """One node of a network, or of an engine that was loaded."""

    def __init__(self, op: Op, values: dict[str, int]) -> None:
        trt.IPluginV3.__init__(self)
        trt.IPluginV3OneCore.__init__(self)
        trt.IPluginV3OneBuild.__init__(self)
        trt.IPluginV3OneRuntime.__init__(self)
        self.plugin_name, self.plugin_namespace, self.plugin_version = op.name, NAMESPACE, VERSION
        self.num_outputs = 1
        self._op, self._values, self._kernels = op, values, CURRENT.kernels
        # A field does not own its data: the arrays live as long as the plugin.
        self._arrays = {name: np.array([value], np.int32) for name, value in values.items()}
        self._tactic, self._dtype = 1, ""
        self._formats: tuple[str, ...] = ()
        self._dims: tuple[tuple[int, ...], ...] = ()

    # ---- network --------------------------------------------------------------------------------------------------

    def get_capability_interface(self, type: Any) -> Any:
        """Every capability is this object."""
        return self

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """int8 codes, or the type that a product is written in."""
        count = len(self._op.inputs)
        return [DTYPES[self._op.output([(0, 0, 0, 0)] * count, self._values)[1]]]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        """As expressions of the inputs' sizes."""
        dims = [tuple(_Expression(builder, size) for size in shape) for shape in inputs]
        sizes, _ = self._op.output(dims, self._values)
        shape = trt.DimsExprs(len(sizes))
        for index, size in enumerate(sizes):
            shape[index] = size.inner
        return [shape]

    def supports_format_combination(self, position: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        """Whether what is chosen up to a position is the beginning of a way to run the node."""
        descs = [entry.desc for entry in in_out]
        first = NAMES.get(descs[0].type.name)
        if first is None:
            return False
        asked = [(NAMES.get(desc.type.name), desc.format.name) for desc in descs[: position + 1]]
        choices = self._choices([tuple(desc.dims) for desc in descs[:num_inputs]], first)
        return any(list(zip(c.types, c.formats, strict=True))[: position + 1] == asked for c in choices)

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Remembers what TensorRT settled on."""
        self._remember([value.desc for value in inputs], [value.desc for value in outputs])
        self.timing_cache_id = self._timing_id()

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """The same when the engine runs."""
        self._remember(inputs, outputs)

    def get_valid_tactics(self) -> list[int]:
        """One a kernel."""
        return list(range(1, len(self._tactics()) + 1))

    def set_tactic(self, tactic: int) -> None:
        """TensorRT counts from 1; 0 means that it has no preference."""
        self._tactic = max(1, tactic)

    # ---- engine ---------------------------------------------------------------------------------------------------

    def get_fields_to_serialize(self) -> Any:
        """The attributes, with which the plugin is made again when the engine is loaded."""
        fields = [trt.PluginField(name, array, trt.PluginFieldType.INT32) for name, array in self._arrays.items()]
        return trt.PluginFieldCollection(fields)

    def attach_to_context(self, context: Any) -> Any:
        """Every context has its own shapes."""
        return self.clone()

    def clone(self) -> "HqcPlugin":
        """The same state in a new plugin."""
        copy = HqcPlugin(self._op, self._values)
        copy._kernels = self._kernels
        copy._tactic, copy._formats, copy._dims, copy._dtype = self._tactic, self._formats, self._dims, self._dtype
        return copy

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launches the tactic's kernel on TensorRT's stream."""
        self._remember(input_desc, output_desc)
        kernel = self._tactics()[self._tactic - 1]
        launch = self._choice().variant.launch(self._dims[0], kernel.tile, lambda size, divisor: -(-size // divisor))
        loaded = load_kernel(kernel.ptx, kernel.entry, kernel.shared_bytes)
        loaded.launch(inputs, launch.integers, outputs[0], launch.grid, kernel.threads, stream)

    # ---- state ----------------------------------------------------------------------------------------------------

    def _remember(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._formats = tuple(desc.format.name for desc in (*inputs, *outputs))
        self._dims = tuple(tuple(desc.dims) for desc in inputs)
        self._dtype = NAMES[inputs[0].type.name]

    def _timing_id(self) -> str:
        """Timings of other PTX are not this plugin's."""
        digest = hashlib.sha256()
        for kernel in self._tactics():
            digest.update(kernel.ptx)
        return digest.hexdigest()

    def _choices(self, dims: Sequence[Any], dtype: str) -> tuple[Choice, ...]:
        return self._op.choices(dims, dtype, self._values)

    def _choice(self) -> Choice:
        found = [c for c in self._choices(self._dims, self._dtype) if c.formats == self._formats]
        if not found:
            asked = f"TensorRT asks for formats {', '.join(self._formats)}, which were not offered"
            raise PluginError(self._op.name, asked, "Report a bug.")
        return found[0]

    def _tactics(self) -> tuple[Kernel, ...]:
        if self._kernels is None:
            raise PluginError(
                self._op.name, "no kernels are registered", "Call register(FOLDER) before loading an engine."
            )
        return self._kernels.tactics(self._choice().variant.key)


class _Expression:
    """TensorRT's expression of a size with Python's operators, as `nodes` writes its formulas."""

    def __init__(self, builder: Any, inner: Any) -> None:
        self.builder, self.inner = builder, inner

    def _combine(self, operation: Any, other: "int | _Expression") -> "_Expression":
        inner = other.inner if isinstance(other, _Expression) else self.builder.constant(other)
        return _Expression(self.builder, self.builder.operation(operation, self.inner, inner))

    def __add__(self, other: "int | _Expression") -> "_Expression":
        return self._combine(trt.DimensionOperation.SUM, other)

    def __sub__(self, other: "int | _Expression") -> "_Expression":
        return self._combine(trt.DimensionOperation.SUB, other)

    def __floordiv__(self, other: "int | _Expression") -> "_Expression":
        return self._combine(trt.DimensionOperation.FLOOR_DIV, other)


class HqcCreator(trt.IPluginCreatorV3One):  # type: ignore[misc]
    """Makes plugins of one node from a network's attributes or an engine's fields."""

    def __init__(self, op: Op) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_namespace, self.plugin_version = op.name, NAMESPACE, VERSION
        self._op, self._empty = op, np.array([], np.int32)
        fields = [trt.PluginField(name, self._empty, trt.PluginFieldType.INT32) for name in op.attributes]
        self.field_names = trt.PluginFieldCollection(fields)

    def create_plugin(self, name: str, fields: Any, phase: Any) -> HqcPlugin:
        """Raises:
        PluginError: if an attribute is missing.
        """
        values = {field.name: int(field.data[0]) for field in fields if field.name in self._op.attributes}
        if missing := [attribute for attribute in self._op.attributes if attribute not in values]:
            raise PluginError(f"{self._op.name} {name}", f"lacks {', '.join(missing)}", "Export the model again.")
        return HqcPlugin(self._op, values)


def register_creators() -> None:
    """Puts the creators of all nodes into TensorRT's registry."""
    registry = trt.get_plugin_registry()
    for op in OPS.values():
        creator = HqcCreator(op)
        registry.register_creator(creator, NAMESPACE)
        _CREATORS.append(creator)
