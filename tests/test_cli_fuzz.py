"""Command lines at random: every command with any of its options, on models of every kind; it works or says why not.

The values are plausible and implausible ones of each option's type, from click's own table of commands. HQC_FUZZ is how
many lines are tried (a few seconds' worth without it), HQC_FUZZ_SEED where they begin.
"""

import os
import random
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from fuzz_artefacts import make_artefacts

from hqc.cli import main
from hqc.errors import LONGEST_LINE, LONGEST_LIST

LINES = int(os.environ.get("HQC_FUZZ", "60"))
SEED = int(os.environ.get("HQC_FUZZ_SEED", "0"))
LONGEST_SECONDS = 60.0

# How often each command is tried: those that start processes, capture, or need a machine that is not here, less often.
WEIGHTS = {
    "ptq": 6,
    "export": 4,
    "sample": 4,
    "explain": 4,
    "compare": 4,
    "qat": 3,
    "eval": 3,
    "inspect": 2,
    "serve": 2,
}

# Without a bound a command would take as long as it does for a user who wants good figures.
SMALL: dict[str, tuple[object, ...]] = {
    "num_inference_steps": (2, 2, 2, 1, 3, 1, 2, 101, 1001),
    "calib_size": (1, 2),
    "batch_size": (1, 2, 3),
    "batch_sizes": ("1", "2,1", "0", "1,,2", "x"),
    "steps": (1, 2),
    "epochs": (1,),
    "checkpoint_every": (1, 2),
    "images": (1, 2, 12),
    "gain_images": (0, 1, 2),
    "per_class": (1, 2),
    "timesteps": (1, 2, 3),
    "runs": (1,),
    "warm_up": (0, 1),
    "sensitivity_samples": (1, 2),
    "opset": (21, 22, 25),
    "latent_size": (4, 8, 16, 5, 4096),
    "condition_length": (1, 5, 4096),
    "limit_seconds": (1,),
    "max_images": (1, 64),
    "threads": (1, 2),
}
NEEDED = ("num_inference_steps", "calib_size", "batch_size", "images", "per_class", "sensitivity", "runs", "warm_up")
TEXTS: dict[str, tuple[str, ...]] = {
    "bits": ("w4a4", "W8A8", "w2a2", "w8a3", "w4a4", "w8a8", "w9a9", "w4", "", "w\u0664a4"),
    "recipe": ("rtn", "hq-dm", "hq-dm-reference", "rtn", "hq-dm", "\u00e9"),
    "recipes": ("rtn", "rtn,rtn+hadamard", "all", "hq-dm-hadamard,rtn", "rtn-hadamard", "x.yaml", "rtn,,", "\u00e9"),
    "rules": ("default", "reference", "mixed", "all", "none"),
    "keep_float": ("*", "conv_in", "*", "*res*", "*attn*", "[", "", "nothing.*"),
    "labels": ("0-9", "1", "1,4", "0", "2-3", "9-0", "3,12", "99", "x", "", "0-99999999"),
    "against": ("onnxruntime-fp32", "torch,torch", "", "x"),
    "arch": ("sm_80", "sm_999", "", "sm_80,sm_80", "90"),
    "plugin_arch": ("sm_80", "sm_1", ""),
    "weight_only": ("*", "conv_in", "x"),
    "variant": ("fp16", "..", ""),
    "revision": ("main", ""),
    "host": ("127.0.0.1", "999.1.1.1", ""),
}
MODELS = ("model", "program", "folder", "a", "b", "float_model", "compare_with")
JUNK = ("-1", "0", "99999999999999999999", "1e400", "nan", "x", "", "\u0000"[:0], "--", "\u20ac")


class Lines:
    """Draws command lines for what is in a folder."""

    def __init__(self, made: SimpleNamespace, seed: int) -> None:
        self.made, self.draw = made, random.Random(seed)

    def line(self) -> list[str]:
        """A command with its arguments, and some of its options in any order."""
        names = list(main.commands)
        name = self.draw.choices(names, [WEIGHTS.get(name, 1) for name in names])[0]
        command, path = main.commands[name], [name]
        if isinstance(command, click.Group):
            path.append(self.draw.choice(list(command.commands)))
            command = command.commands[path[-1]]
        parameters = command.params
        self.models = self.usual(name)
        arguments = [self.value(p) for p in parameters if isinstance(p, click.Argument)]
        if self.draw.random() < 0.03:
            arguments = arguments[1:] if self.draw.random() < 0.5 else [*arguments, "more"]
        words = [self.option(p) for p in parameters if isinstance(p, click.Option) and self.wanted(p)]
        if name == "qat" and not any({"--steps", "--epochs"} & set(word) for word in words):
            words.append(["--steps", "1"])
        self.draw.shuffle(words)
        return [*path, *arguments, *(part for word in words for part in word)]

    def usual(self, command: str) -> list[str]:
        """The models that a command is most likely to take."""
        captured = [name for name in self.made.programs if "-" not in name]
        whole = [name for name in self.made.programs if name.startswith(("labelled", "plain"))]
        quantised = [name for name in self.made.programs if "-" in name]
        by_command = {"ptq": captured, "qat": captured, "explain": captured, "export": quantised, "tune": quantised}
        if command in ("sample", "eval", "serve", "bench-serve"):
            return [*whole, *self.made.exports, "digits"]
        by_command["build-engine"] = ["tensorrt"]
        return by_command.get(command, self.made.programs)

    def wanted(self, option: click.Option) -> bool:
        return option.required or option.name in NEEDED or self.draw.random() < 0.12

    def option(self, option: click.Option) -> list[str]:
        spelled = self.draw.choice([*option.opts, *option.secondary_opts])
        if option.name == "sensitivity":
            return ["--no-sensitivity"] if self.draw.random() < 0.8 else ["--sensitivity"]
        if option.is_flag:
            return [spelled]
        return [spelled, self.value(option)]

    def value(self, parameter: click.Parameter) -> str:
        """A plausible value of a parameter, now and then an implausible one."""
        name, kind = str(parameter.name), parameter.type
        if name == "output":
            return self.draw.choice([*["made/out"] * 8, "made/not/there/out", "made/mine", "words.txt/x", "."])
        if self.draw.random() < 0.03:
            return self.draw.choice(JUNK)
        if name == "source":
            return self.draw.choice(
                [*["mine:build"] * 6, *self.made.sources, *self.made.programs[:1], *self.made.others]
            )
        if name in MODELS or (name == "against" and parameter.type is not click.STRING):
            return self.model()
        if name in ("prompts", "config"):
            return self.draw.choice(self.made.texts)
        if name in SMALL:
            return str(self.draw.choice(SMALL[name]))
        if name in TEXTS:
            return self.draw.choice(TEXTS[name])
        if isinstance(kind, click.Choice):
            return str(self.draw.choice([*[*kind.choices] * 4, "other"]))
        if isinstance(kind, (click.IntRange, click.FloatRange)):
            low, high = kind.min or 0, kind.max if kind.max is not None else 1000
            return str(self.draw.choice([*[low, low + 1, high] * 4, low - 1, high + 1]))
        if isinstance(kind, click.Path):
            return self.draw.choice(
                ["made/file.csv", "made/file.svg", "made/new", "made/mine", "words.txt", "made/not/there"]
            )
        return self.draw.choice(["1", "1e-3", "0", "-1", "nan", "x"])

    def model(self) -> str:
        kinds = (*[self.models] * 8, self.made.programs, self.made.exports, self.made.others)
        return str(self.draw.choice(self.draw.choice(kinds)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make_artefacts(tmp_path_factory.mktemp("fuzz"))


@contextmanager
def no_long_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What listens, compiles or times in processes of its own is entered and left at once."""

    def nothing(*args: Any, **options: Any) -> None:
        raise click.exceptions.Exit(0)

    with monkeypatch.context() as patch:
        patch.setattr("hqc.serving.server.serve", nothing)
        patch.setitem(sys.modules, "ray", None)  # where it is installed: no clusters
        patch.setattr("hqc.engines.build.run_builder", nothing)
        patch.setattr("hqc.serving.bench.run.bench_serve", nothing)
        patch.setattr("hqc.evaluation.bench.run._measure", nothing)
        patch.setattr("hqc.evaluation.comparison.run.compare_recipes", nothing)
        yield


def fresh(folder: Path) -> None:
    """Where lines write: empty, but for a folder that is the user's own."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")


def run(line: list[str]) -> tuple[int, str]:
    """The exit status of a command line and what it says on standard error; exceptions are not caught."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main.main(line, prog_name="hqc", standalone_mode=False) or 0
        except click.ClickException as error:
            error.show()
            status = error.exit_code
        except click.exceptions.Exit as error:
            status = error.exit_code
    return int(status), err.getvalue()


def problem(status: int, said: str) -> str:
    """What is wrong with how a command ended."""
    if status not in (0, 2):
        return f"status {status}"
    if "Report a bug" in said or "Traceback" in said:
        return "a bug"
    if status == 0:
        return "noise" if re.search(r"[Ww]arning", said) else ""
    last = said.rstrip("\n").splitlines()[-1] if said.strip() else ""
    if not last.startswith(("hqc: ", "Error: ")):
        return "no reason"
    if last.startswith("hqc: ") and (said.count("\n") != 1 or len(last) > LONGEST_LIST + 5):
        return "not one line"
    if not last.isprintable():
        return "not printable"
    return "long" if len(last) > LONGEST_LINE + 7 and "; " not in last else ""


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # diffusers
def test_every_line_works_or_says_why_not(
    made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, record: Callable[[str], None]
) -> None:
    monkeypatch.chdir(made.work)
    monkeypatch.syspath_prepend(made.work)
    lines = Lines(made, SEED)
    ends: dict[int, int] = {}
    found = []
    with no_long_work(monkeypatch):
        for _ in range(LINES):
            line, start = lines.line(), time.perf_counter()
            fresh(made.work / "made")
            try:
                status, said = run(line)
                wrong = problem(status, said)
            except Exception as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                status, said, wrong = -1, f"{type(error).__name__}: {error}", f"{frame.filename}:{frame.lineno}"
            seconds = time.perf_counter() - start
            kept = made.work / "made" / "mine" / "thesis.txt"
            wrong = wrong or ("" if kept.is_file() else "the user's folder is gone")
            ends[status] = ends.get(status, 0) + 1
            if wrong or seconds > LONGEST_SECONDS:
                found.append(f"hqc {' '.join(map(repr, line))}\n    {wrong} {seconds:.1f} s: {said[:400]}")
                record(found[-1])
    record(f"exit statuses: {ends}")
    assert not found, f"{len(found)} of {LINES}:\n" + "\n".join(found[:10])
    assert ends.get(0, 0) > LINES // 20, ends
    assert ends.get(2, 0) > LINES // 20, ends


@pytest.fixture
def record() -> Iterator[Callable[[str], None]]:
    """Writes what is found to the file that HQC_FUZZ_LOG names, while a long run goes on."""
    name = os.environ.get("HQC_FUZZ_LOG")
    if name is None:
        yield lambda text: None
        return
    with Path(name).open("a", encoding="utf-8") as file:
        yield lambda text: print(text, file=file, flush=True)
