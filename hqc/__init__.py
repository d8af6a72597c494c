"""hqc, the Hadamard Quantisation Compiler: low-bit latent diffusion from checkpoint to integer kernels.

    import hqc

    program = hqc.trace("digits")
    quantised = hqc.ptq(program, "rtn", "w4a4", hadamard=True)
    hqc.export_program(quantised, "onnxruntime", "digits-onnx")
    pipe = hqc.load("digits-onnx").pipeline()

Names are imported on first use, so that `import hqc` and `hqc --help` stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hqc.api import attach_loras, merge_loras, ptq, qat, quantise, task_of
    from hqc.capture import trace
    from hqc.errors import HqcError
    from hqc.export import TensorRtOptions, export_program
    from hqc.program import Program
    from hqc.runtimes import load
    from hqc.sampling import Task
    from hqc.storage import load_program, save_program

__version__ = "0.1.0"
__all__ = [
    "HqcError",
    "Program",
    "Task",
    "TensorRtOptions",
    "attach_loras",
    "export_program",
    "load",
    "load_program",
    "merge_loras",
    "ptq",
    "qat",
    "quantise",
    "save_program",
    "task_of",
    "trace",
]

_WHERE = {
    "HqcError": ("hqc.errors", "HqcError"),
    "Program": ("hqc.program", "Program"),
    "Task": ("hqc.sampling", "Task"),
    "TensorRtOptions": ("hqc.export", "TensorRtOptions"),
    "attach_loras": ("hqc.api", "attach_loras"),
    "export_program": ("hqc.export", "export_program"),
    "load": ("hqc.runtimes", "load"),
    "load_program": ("hqc.storage", "load_program"),
    "merge_loras": ("hqc.api", "merge_loras"),
    "ptq": ("hqc.api", "ptq"),
    "qat": ("hqc.api", "qat"),
    "quantise": ("hqc.api", "quantise"),
    "save_program": ("hqc.storage", "save_program"),
    "task_of": ("hqc.api", "task_of"),
    "trace": ("hqc.capture", "trace"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hqc' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(import_module(module), attribute)
