"""ONNX Runtime's own static quantisation, in a process of its own: `python -m hqc.evaluation.bench.ort_int8`.

    ort_int8 FLOAT.onnx CALIBRATION.npz TARGET.onnx {full,seven}     prints {"notes": […]}

`quantize_static` as its documentation recommends for convolution networks on CPUs: QDQ, per-channel s8 weights, u8
activations, MinMax calibration; seven-bit weights (`reduce_range`) where u8 x s8 products would saturate.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from hqc.evaluation.bench.batches import Batch, read_batches
from hqc.export.ort_session import import_onnxruntime

__all__ = ["main"]

EXTERNAL_BYTES = 10**9
"""Above this the tool is told to keep weights beside the models that it writes on the way."""


def quantise(model: Path, calibration: Path, target: Path, *, reduce_range: bool) -> list[str]:
    """Writes the quantised model; returns what a reader of its figures should know."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    external = sum(file.stat().st_size for file in model.parent.glob(model.name + "*")) > EXTERNAL_BYTES
    prepared, notes = _preprocess(model, target.parent, external)
    quantize_static(
        str(prepared),
        str(target),
        _reader(prepared, calibration),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduce_range,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=external,
    )
    if reduce_range:
        notes.append("seven-bit weights (reduce_range): the CPU has no VNNI")
    return notes


def _reader(model: Path, calibration: Path) -> Any:
    """The batches, with the inputs that the graph kept."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader

    names = {value.name for value in onnx.load(model, load_external_data=False).graph.input}

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = read_batches(calibration)

        def get_next(self) -> Batch | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: array for name, array in batch.items() if name in names}

    return Reader()


def _preprocess(model: Path, folder: Path, external: bool) -> tuple[Path, list[str]]:
    """The model after `quant_pre_process`: whole, without symbolic shapes, or not at all; and what was left out."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    target, notes = folder / "prepared.onnx", []
    for options, left_out in (({}, ""), ({"skip_symbolic_shape": True}, "symbolic shape inference")):
        try:
            quant_pre_process(
                str(model),
                str(target),
                save_as_external_data=external,
                external_data_location=target.name + ".data" if external else None,
                **options,
            )
        except Exception as error:  # the tool raises bare Exception
            last = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            for left in folder.glob(target.name + "*"):
                left.unlink()
            continue
        if left_out:
            notes.append(f"quant_pre_process without {left_out} ({last})")
        return target, notes
    return model, [f"without quant_pre_process ({last})"]


def main() -> None:
    """Runs in an empty folder: the tool leaves files where it stands."""
    import_onnxruntime()
    model, calibration, target, weights = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    notes = quantise(Path(model), Path(calibration), Path(target), reduce_range=weights == "seven")
    answers.write(json.dumps({"notes": notes}) + "\n")
    answers.close()


if __name__ == "__main__":
    main()
