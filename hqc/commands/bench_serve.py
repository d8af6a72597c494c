"""The command that measures the server: bench-serve."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import Command, served_runtime
from hqc.commands.bench import bench_workspace
from hqc.commands.options import check_output_file, force_option, json_option, runtime_option
from hqc.commands.serve import lanes_option, threads_option
from hqc.errors import OptionError

if TYPE_CHECKING:
    from hqc.evaluation.workspace import Workspace
    from hqc.serving.bench.server import Source

__all__ = ["Between", "bench_serve"]


class Between(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """One whole number, or the least and the most of them: 10-30."""

    name = "numbers"

    def __init__(self, what: str, most: int) -> None:
        self._what, self._most = what, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        first, _, last = str(value).partition("-")
        last = last or first
        if not all(part.isascii() and part.isdecimal() and 1 <= int(part) <= self._most for part in (first, last)):
            self.fail(f"{value!r} is not {self._what} in 1…{self._most}, or two of them as 1-3", param, ctx)
        if int(first) > int(last):
            self.fail(f"{value!r} begins above its end", param, ctx)
        return int(first), int(last)


@click.command("bench-serve", cls=Command)
@click.argument("model")
@runtime_option
@click.option("--requests", type=click.IntRange(8, 100_000), default=64, show_default=True, help="Of every figure.")
@click.option(
    "--steps",
    type=Between("a number of steps", 1000),
    default="10-30",
    show_default=True,
    help="Of a request, least and most.",
)
@click.option("--guidance-scale", type=click.FloatRange(0, 20), default=1.5, show_default=True)
@click.option("--max-batch", type=click.IntRange(1, 256), default=8, show_default=True, help="Images under way.")
@threads_option
@lanes_option
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Of the arrivals.")
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep what is made of a float MODEL there, and take it again while it fits (default: a temporary folder).",
)
@click.option("--chart", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="A .png or .svg of it.")
@force_option
@json_option
def bench_serve(
    model: str,
    runtime: Any,
    requests: int,
    steps: tuple[int, int],
    guidance_scale: float,
    max_batch: int,
    threads: int | None,
    lanes: int | None,
    seed: int,
    work_dir: Path | None,
    chart: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure `hqc serve` of MODEL on this machine: adaptive, continuous, static and one-at-a-time batching.

    Images a second when saturated, and latencies under Poisson arrivals at shares of what one at a time can do. The
    server is a process of its own on a free port of the loopback interface. MODEL: whatever `hqc serve` takes, or
    arch:NAME, which is traced, quantised and exported first, and draws latents of random conditions.
    """
    from rich.console import Console

    from hqc import console as out
    from hqc.evaluation.drawing import check_chart
    from hqc.serving.bench.report import save_serve_chart, serve_table
    from hqc.serving.bench.run import POLICIES, Protocol
    from hqc.serving.bench.run import bench_serve as measure

    if chart is not None:
        check_chart(chart, force=force)
        check_output_file(chart, force=force)
    protocol = Protocol(requests=requests, steps=steps, guidance_scale=guidance_scale, max_batch=max_batch, seed=seed)
    figures = len(POLICIES) * (1 + len(protocol.shares))
    with (
        out.progress("requests", requests * figures) as advance,
        bench_workspace(work_dir, force, lambda stage: advance(0, stage)) as space,
    ):
        source, name = _source(model, runtime, threads, lanes, space)
        before: list[str] = []

        def told(what: str, done: int) -> None:
            if what not in before:
                before.append(what)
            advance((len(before) - 1) * requests + done, what)

        result = measure(model, source, name, protocol, told)
    if chart is not None:
        save_serve_chart(chart, result)
    if as_json:
        out.print_json(result.to_dict())
    else:
        Console(width=max(200, out.console.width)).print(serve_table(result), soft_wrap=True)


def _source(
    model: str, runtime: Any, threads: int | None, lanes: int | None, space: "Workspace"
) -> "tuple[Source, str]":
    """What is served, and the runtime's name."""
    from hqc.serving.bench.server import Source
    from hqc.serving.opening import divided

    if not model.startswith("arch:"):
        name = served_runtime(model, runtime)
        lanes, threads = divided(name, lanes, threads)
        return Source(model, runtime, None, threads, lanes), name
    if runtime not in (None, "onnxruntime"):
        raise OptionError(f"--runtime {runtime}", f"{model} is exported for onnxruntime", "Leave it out.")
    from hqc.evaluation.bench.models import Quantisation, find_models

    made = find_models(model, None, Quantisation(), space, one_timestep=False)
    lanes, threads = divided("onnxruntime", lanes, threads)
    return Source(str(made.export), "onnxruntime", made.float_program, threads, lanes), "onnxruntime"
