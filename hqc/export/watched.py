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
    """A copy of a model that also returns what the taps listen to; one session serves every run.

    Use as a context manager: the copy lies beside the model, where its external data is.
    """

    def __init__(self, model: Path, taps: Sequence[Tap], *, values: Iterable[str] = ()) -> None:
        """values: names of further float values to watch."""
        self._copy = model.with_name("watched.onnx")
        self._taps = taps
        proto = onnx.load(str(model), load_external_data=False)
        inputs = {value.name for value in proto.graph.input}
        known = inputs | {value.name for value in proto.graph.output}
        kinds = dict.fromkeys(values, onnx.TensorProto.FLOAT) | dict(self._kinds())
        # Where the file notes a type, that is it: a site may be watched in half precision.
        kinds |= {v.name: v.type.tensor_type.elem_type for v in proto.graph.value_info if v.name in kinds}
        for name, kind in sorted(kinds.items()):
            if name not in known:
                proto.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
        onnx.save(proto, str(self._copy))

    def _kinds(self) -> Mapping[str, int]:
        types = onnx.TensorProto
        kinds = {name: types.FLOAT for tap in self._taps for name in (tap.input.name, tap.output.name)}
        return kinds | {tap.codes.name: types.UINT8 if tap.zero_point else types.INT8 for tap in self._taps}

    def __enter__(self) -> "WatchedModel":
        try:
            self._session = open_session(self._copy, threads=torch.get_num_threads())
        finally:
            self._copy.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        del self._session
        return_free_memory()

    def run(self, names: Iterable[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The named values, inputs among them."""
        outputs = sorted(set(names) - set(feeds))
        found = run_session(self._session, outputs, feeds)
        return dict(zip(outputs, found, strict=True)) | {n: array for n, array in feeds.items() if n in set(names)}


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
    part = model.with_name("constants.onnx")  # beside the model, where its external data is
    try:
        onnx.save(_upstream(onnx.load(str(model), load_external_data=False), names), str(part))
        session = open_session(part, optimisation="disabled")
    finally:
        part.unlink(missing_ok=True)
    return dict(zip(names, session.run(list(names), {}), strict=True))


def _upstream(proto: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The part of a graph that the named values come from, as a model that returns them."""
    wanted, nodes = set(names), []
    for node in reversed(proto.graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            nodes.append(node)
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT8, None) for name in names]
    stored = [tensor for tensor in proto.graph.initializer if tensor.name in wanted]
    graph = onnx.helper.make_graph(nodes[::-1], "constants", [], outputs, stored)
    return onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
