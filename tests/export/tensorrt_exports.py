"""What the TensorRT tests share: exports by their options, made once, and what is read from their files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from hqc.export import ExportReport, TensorRtOptions, export_program
from hqc.export.reference import verification_inputs
from hqc.passes import InsertHadamard
from hqc.program import Program

__all__ = ["Build", "attributes", "builder", "constants", "feeds_of", "producers", "read", "relative"]

Build = Callable[..., tuple[Program, Path, ExportReport]]


def builder(captured: Callable[[str], Program], quantised: Callable[..., Program], work: Path) -> Build:
    """build(model, bits or None, one_timestep=False, rotation=HQ-DM's, ranges="symmetric", **options): program, folder,
    report, made once.

    Plugins come without their kernels.
    """
    made: dict[object, tuple[Program, Path, ExportReport]] = {}

    def build(
        name: str,
        bits: str | None,
        *,
        one_timestep: bool = False,
        rotation: InsertHadamard | None = None,
        ranges: str = "symmetric",
        **options: Any,
    ):
        chosen = TensorRtOptions(**options, plugin_archs=())
        key = (name, bits, one_timestep, rotation, ranges, chosen)
        if key not in made:
            how = {"ranges": ranges} | ({"rotation": rotation} if rotation else {})
            program = captured(name) if bits is None else quantised(name, bits, **how)
            report = export_program(
                program,
                "tensorrt",
                work / f"{len(made)}_{name}",
                float_program=captured(name) if bits else None,
                one_timestep=one_timestep,
                tensorrt=chosen,
            )
            made[key] = program, report.folder, report
        return made[key]

    return build


def read(folder: Path) -> onnx.ModelProto:
    return onnx.load(str(folder / "model.onnx"))


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in graph.node for name in node.output}


def constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def feeds_of(program: Program, batch: int) -> dict[str, np.ndarray]:
    args = verification_inputs(program, batch)
    return {spec.name: arg.numpy() for spec, arg in zip(program.inputs, args, strict=True)}


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
