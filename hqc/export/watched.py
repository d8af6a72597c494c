"""What verification listens to: values of a copy of the model that also returns them, and constants on their own."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from hqc.export.lowering import Listen, Tap
from hqc.export.ort_session import open_session, run_session
from hqc.memory import return_free_memory

__all__ = ["Array", "WatchedModel", "constants", "heard"]

Array = NDArray[Any]


class WatchedModel:
    """A copy of a model that also returns what the taps listen to.

    The copy is optimised once; a run then takes the part of it that the wanted values come from. A session of the whole
    copy would hold every value that anybody may ask for at once: 15 GB for SDXL.
    Use as a context manager: the copies lie beside the model, where its external data is.
    """

    def __init__(self, model: Path, taps: Sequence[Tap], *, values: Iterable[str] = (), optimised: bool = True) -> None:
        """values: names of further float values to watch. optimised: False runs the nodes as they are written."""
        self._model, self._taps, self._values, self._optimise = model, taps, tuple(values), optimised
        self._optimised = model.with_name("watched.onnx")

    def _kinds(self) -> Mapping[str, int]:
        types = onnx.TensorProto
        kinds = {name: types.FLOAT for tap in self._taps for name in (tap.input.name, tap.output.name)}
        kinds |= dict.fromkeys(self._values, types.FLOAT)
        return kinds | {tap.codes.name: types.UINT8 if tap.zero_point else types.INT8 for tap in self._taps}

    def __enter__(self) -> "WatchedModel":
        proto = onnx.load(str(self._model), load_external_data=False)
        known = {value.name for value in (*proto.graph.input, *proto.graph.output)}
        # Where the file notes a type, that is it: a site may be watched in half precision.
        noted = {v.name: v.type.tensor_type.elem_type for v in proto.graph.value_info}
        for name, kind in sorted(self._kinds().items()):
            if name not in known:
                proto.graph.output.append(onnx.helper.make_tensor_value_info(name, noted.get(name, kind), None))
        if not self._optimise:
            onnx.save(proto, str(self._optimised))
            return self
        copy = self._model.with_name("to_watch.onnx")
        try:
            onnx.save(proto, str(copy))
            open_session(copy, threads=1, save_to=self._optimised)
        finally:
            copy.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._optimised.parent.glob(self._optimised.name + "*"):
            path.unlink()
        return_free_memory()

    def run(self, names: Iterable[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The named values, inputs among them."""
        wanted = set(names)
        outputs = sorted(wanted - set(feeds))
        session = _part_session(self._optimised, outputs, threads=torch.get_num_threads())
        taken = {value.name for value in session.get_inputs()}
        found = run_session(session, outputs, {name: array for name, array in feeds.items() if name in taken})
        return dict(zip(outputs, found, strict=True)) | {n: array for n, array in feeds.items() if n in wanted}


def heard(where: Listen, values: Mapping[str, Array]) -> Tensor:
    """A watched value in torch's layout."""
    tensor = torch.from_numpy(values[where.name])
    tensor = tensor.float() if tensor.dtype == torch.float16 else tensor
    return tensor if where.perm is None else tensor.permute(where.perm).contiguous()


def constants(model: Path, names: Sequence[str]) -> dict[str, Array]:
    """Values that depend on nothing but stored weights, as the runtime computes them from what the file holds.

    Apart from the network: a session that returned them would keep every weight twice, as it is and packed.
    """
    if not names:
        return {}
    session = _part_session(model, names, threads=None)
    return dict(zip(names, session.run(list(names), {}), strict=True))


def _part_session(model: Path, names: Sequence[str], *, threads: int | None) -> Any:
    """A session of the part of a model that the named values come from, run node by node as it stands."""
    part = model.with_name("part.onnx")  # beside the model, where its external data is
    try:
        onnx.save(_upstream(onnx.load(str(model), load_external_data=False), names), str(part))
        return open_session(part, threads=threads, optimisation="disabled")
    finally:
        part.unlink(missing_ok=True)


def _upstream(proto: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The part of a graph that the named values come from, as a model that returns them."""
    graph, wanted, nodes = proto.graph, set(names), []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            nodes.append(node)
    typed = {value.name: value for value in graph.output}
    unknown = onnx.TensorProto.INT8
    outputs = [typed.get(name) or onnx.helper.make_tensor_value_info(name, unknown, None) for name in names]
    inputs = [value for value in graph.input if value.name in wanted]
    stored = [tensor for tensor in graph.initializer if tensor.name in wanted]
    part = onnx.helper.make_graph(nodes[::-1], "part", inputs, outputs, stored)
    return onnx.helper.make_model(
        part, opset_imports=proto.opset_import, ir_version=proto.ir_version, functions=proto.functions
    )
