"""NNCF's post-training quantisation for OpenVINO: `python -m hqc.evaluation.bench.openvino_int8`, its own process.

    openvino_int8 FLOAT.onnx CALIBRATION.npz TARGET.xml {full,seven}     prints {"notes": […]}

`nncf.quantize` as OpenVINO's own notebooks quantise the UNets of diffusion pipelines: the scheme for models with
attention (smooth quantisation of linear layers included), no correction of biases; seven-bit weights (`overflow_fix`)
where u8 x s8 products would saturate.
"""

import json
import os
import sys
from pathlib import Path

from hqc.evaluation.bench.batches import Batch, read_batches

__all__ = ["main"]

TELEMETRY_OFF = "NNCF_CI"
"""With this set NNCF sends nothing to its makers; it would, unasked."""


def quantise(model: Path, calibration: Path, target: Path, *, reduce_range: bool) -> list[str]:
    """Writes the quantised model; returns what a reader of its figures should know."""
    import nncf
    import openvino

    network = openvino.Core().read_model(model)
    names = {port.any_name for port in network.inputs}
    batches = list(read_batches(calibration))

    def feeds(batch: Batch) -> Batch:
        return {name: array for name, array in batch.items() if name in names}

    quantised = nncf.quantize(
        network,
        nncf.Dataset(batches, feeds),
        subset_size=len(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            disable_bias_correction=True,
            overflow_fix=nncf.OverflowFix.ENABLE if reduce_range else nncf.OverflowFix.FIRST_LAYER,
        ),
    )
    openvino.save_model(quantised, target, compress_to_fp16=False)
    return ["seven-bit weights (overflow_fix): the CPU has no VNNI"] if reduce_range else []


def main() -> None:
    """Runs in an empty folder: what the tool prints and leaves stays there."""
    os.environ.setdefault(TELEMETRY_OFF, "1")
    model, calibration, target, weights = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    notes = quantise(Path(model), Path(calibration), Path(target), reduce_range=weights == "seven")
    answers.write(json.dumps({"notes": notes}) + "\n")
    answers.close()


if __name__ == "__main__":
    main()
