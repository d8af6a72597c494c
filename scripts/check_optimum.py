"""Opens an exported pipeline in optimum, and compares its images with hqc's own.

    hqc export student.hqc -o student-pipeline --pipeline --one-timestep
    python -m venv optimum && optimum/bin/pip install optimum-onnx==0.1.0 'diffusers<=0.38' torch onnxruntime
    PYTHONPATH=. optimum/bin/python scripts/check_optimum.py student-pipeline

In an environment of its own: optimum's version ranges exclude the diffusers that hqc needs. Of hqc `hqc.lite` alone is
used there, which needs numpy, onnxruntime and tokenizers. Prints JSON: the versions, and how far the pixels are apart.
"""

import argparse
import json
from importlib.metadata import version

import numpy as np
import torch
from optimum.onnxruntime import ORTDiffusionPipeline

from hqc.lite import LitePipeline

PACKAGES = ("optimum", "optimum-onnx", "diffusers", "transformers", "onnxruntime", "torch")
GREY_LEVELS = 1
# (prompt, seed, guidance scale)
DRAWINGS = (("a cat", 0, 7.5), ("a dog on a bench", 1, 1.0), ("", 2, 3.0))


def main() -> None:
    """Draws the same with both, and says how far they are apart; exit status 1 if by more than one grey level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()
    theirs, ours = ORTDiffusionPipeline.from_pretrained(given.folder, export=False), LitePipeline(given.folder)
    theirs.set_progress_bar_config(disable=True)
    width, height = ours.needs.size
    apart = []
    for prompt, seed, guidance in DRAWINGS:
        drawn = theirs(
            prompt,
            num_inference_steps=given.steps,
            guidance_scale=guidance,
            width=width,
            height=height,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]
        wanted = ours.draw(prompt=prompt, seed=seed, steps=given.steps, guidance_scale=guidance)
        apart.append(int(np.abs(np.rint(drawn * 255).astype(int) - wanted).max()))
    found = {"class": type(theirs).__name__, "versions": {name: version(name) for name in PACKAGES}}
    print(json.dumps({**found, "images": len(apart), "grey_levels_apart": max(apart)}))
    raise SystemExit(max(apart) > GREY_LEVELS)


if __name__ == "__main__":
    main()
