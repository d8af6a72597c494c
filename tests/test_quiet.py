"""Standard error holds what hqc says and nothing of torch, torchvision, diffusers, transformers or onnxruntime."""

import os
import re
import subprocess
import sys
from pathlib import Path

import text_pipelines
import tiny_pipeline

COMMANDS = """
trace pipeline -o p.hqc
trace words/pipeline -o text.hqc
explain p.hqc
inspect p.hqc --no-graph
ptq p.hqc -o q.hqc --n-steps 2 --calib-size 1 --hadamard
ptq text.hqc -o t.hqc --prompts prompts.txt --n-steps 2 --calib-size 1
ptq text.hqc -o u.hqc --synthetic --n-steps 2 --calib-size 1
qat p.hqc -o trained.hqc --n-steps 2 --calib-size 1 --steps 1 --batch-size 1
export q.hqc -o integer
export q.hqc -o portable --target portable
export q.hqc -o tensorrt --target tensorrt
sample integer -o s.png --compare-with trained.hqc --n-steps 2 --per-class 1 --labels 1
compare p.hqc q.hqc --n-steps 2 --timesteps 1 --batch-size 1
analyze p.hqc -o r.html --n-steps 2 --calib-size 1 --no-sensitivity
doctor
"""
# One process for all: a library says its lines when it is first imported or called.
RUN = """
import sys
from hqc.cli import main
for line in sys.stdin.read().strip().splitlines():
    print(line, file=sys.stderr)
    main.main(line.split(), standalone_mode=False)
"""
STAGE = re.compile(r"\[ *\d+ s\] .*")


def test_no_command_says_what_libraries_say(tmp_path: Path) -> None:
    tiny_pipeline.save_tiny_pipeline(tmp_path / "pipeline")
    text_pipelines.save_text_pipeline("sd15", tmp_path / "words")
    (tmp_path / "prompts.txt").write_text("ca\n", encoding="utf-8")
    unset = ("PYTHONWARNINGS", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=COMMANDS,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "HF_HUB_OFFLINE": "1"},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    commands = COMMANDS.strip().splitlines()
    said = [line for line in done.stderr.splitlines() if not STAGE.fullmatch(line)]
    assert said == commands
