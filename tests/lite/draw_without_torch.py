"""Run in a process of its own: draws what JSON on standard input asks for, and prints what was imported.

{"folder": …, "drawings": [[label, prompt, seed, {options}], …]}  ->  FOLDER.npy beside the folder
"""

import json
import sys
from importlib.abc import MetaPathFinder

# What a server without torch is installed with, and what that is made of.
ALLOWED = {
    *("hqc", "numpy", "onnxruntime", "PIL", "tokenizers", "click"),
    *("fastapi", "uvicorn", "starlette", "pydantic", "pydantic_core", "anyio", "h11", "idna", "prometheus_client"),
    *("typing_extensions", "typing_inspection", "annotated_types", "annotated_doc", "_distutils_hack"),
}


class Blocked(MetaPathFinder):
    """No other package can be imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        first = name.partition(".")[0]
        if first not in ALLOWED and first not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocked())

if __name__ == "__main__":
    import numpy as np

    from hqc.lite import LitePipeline

    for asked in json.load(sys.stdin):
        pipe = LitePipeline(asked["folder"], threads=1)
        images = [pipe.draw(label, prompt, seed=seed, **options) for label, prompt, seed, options in asked["drawings"]]
        np.save(asked["to"], np.stack(images))
    third = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
    print(json.dumps(sorted(third)))
