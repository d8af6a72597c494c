"""Run in a process of its own, which can import neither torch nor what else a server without it has not.

With arguments it is `hqc`. Without, it draws what JSON on standard input asks for, and prints what was imported:

    [{"folder": …, "to": FILE, "drawings": [[label, prompt, seed, {options}], …]}, …]
"""

import json
import sys
from importlib.abc import MetaPathFinder

# What hqc depends on and a server without torch is not installed with.
BLOCKED = {
    *("torch", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub", "torchmetrics", "scipy"),
    *("onnx", "onnx_ir", "onnxscript", "psutil", "yaml", "rich", "sklearn", "matplotlib", "plotly", "greenlet"),
}


class Blocked(MetaPathFinder):
    """None of them can be imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocked())
    if len(sys.argv) > 1:
        from hqc.cli import main

        main()

    import numpy as np

    from hqc.lite import LitePipeline

    for asked in json.load(sys.stdin):
        pipe = LitePipeline(asked["folder"], threads=1)
        images = [pipe.draw(label, prompt, seed=seed, **options) for label, prompt, seed, options in asked["drawings"]]
        np.save(asked["to"], np.stack(images))
    third = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
    print(json.dumps(sorted(third)))
