"""The command that times a model against its peers: bench."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hqc.commands.applies import Command, asked, option_name
from hqc.commands.options import check_output_file, claim, force_option, json_option, rules_option, say_stage

if TYPE_CHECKING:
    from hqc.evaluation.workspace import Workspace

__all__ = ["bench", "bench_workspace"]


_CALIBRATION = ("calib_size", "num_inference_steps")


class _BatchSizes(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """One size, or several in a comma-separated list."""

    name = "sizes"

    def convert(
        self, value: "str | tuple[int, ...]", param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        sizes = [part.strip() for part in str(value).split(",")]
        if not all(size.isdecimal() and 1 <= int(size) <= 1024 for size in sizes):
            self.fail(f"{value!r} is not a size in 1…1024 or a comma-separated list of them", param, ctx)
        return tuple(dict.fromkeys(int(size) for size in sizes))


@click.command(cls=Command)
@click.argument("model")
@click.option(
    "--against",
    metavar="PEERS",
    help="Comma-separated: onnxruntime-fp32 (default), onnxruntime-int8 (its own quantize_static), torch, "
    "torch-compile (inductor, needs a C++ compiler), openvino-int8 (nncf.quantize, needs hqc[openvino]), "
    "hqc-onnxruntime (with --runtime torch-int8: the same program exported), "
    "torch-fp16-compile and torch-fp16-cudagraph (default on a GPU: both).",
)
@click.option(
    "--runtime",
    type=click.Choice(["onnxruntime", "torch-int8", "torch-cuda"]),
    default="onnxruntime",
    show_default=True,
    help="What runs the quantised model; torch-int8: integer products by oneDNN; torch-cuda: int8 kernels on a GPU.",
)
@click.option("--float", "float_model", metavar="FLOAT", help="Float side of a quantised MODEL (default: its source).")
@click.option("--bits", help="wNaM, N and M in 2…8, for a float MODEL (default: w4a4).")
@click.option("--no-hadamard", is_flag=True, help="Quantise a float MODEL without rotation.")
@rules_option
@click.option("--calib-size", type=click.IntRange(1, 4096), default=1, show_default=True, help="Images.")
@click.option("--num-inference-steps", "--n-steps", type=click.IntRange(1, 1000), default=4, show_default=True)
@click.option(
    "--batch-size", "batch_sizes", type=_BatchSizes(), default="2", show_default=True, help="One, or several: 1,2,8,32."
)
@click.option("--threads", type=click.IntRange(1, 1024), help="Of one call (default: every core).")
@click.option("--runs", type=click.IntRange(1, 10_000), default=10, show_default=True, help="Timed rounds.")
@click.option("--warm-up", type=click.IntRange(0, 1000), default=3, show_default=True, help="Rounds before those.")
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep what is made there, and take it again while it fits (default: a temporary folder).",
)
@click.option("--chart", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="A .png or .svg of it.")
@force_option
@json_option
def bench(
    model: str,
    against: str | None,
    runtime: str,
    float_model: str | None,
    bits: str | None,
    no_hadamard: bool,
    rules: str | None,
    calib_size: int,
    num_inference_steps: int,
    batch_sizes: tuple[int, ...],
    threads: int | None,
    runs: int,
    warm_up: int,
    work_dir: Path | None,
    chart: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Time MODEL against other runtimes on this machine: the ratio, with what makes it reproducible.

    MODEL: an export, a Program, or whatever `hqc trace` takes; what is missing is traced, quantised (round-to-nearest
    with Hadamard) and exported first. Every contender runs in a process of its own, in turns, on the same inputs.
    """
    from rich.console import Console

    from hqc import console as out
    from hqc.evaluation.bench.chart import save_chart
    from hqc.evaluation.bench.models import Quantisation
    from hqc.evaluation.bench.peers import USUAL_PEERS, find_peers
    from hqc.evaluation.bench.run import Timing
    from hqc.evaluation.bench.run import bench as measure
    from hqc.evaluation.bench.table import bench_table
    from hqc.evaluation.drawing import check_chart

    peers = find_peers(USUAL_PEERS[runtime] if against is None else against)
    if chart is not None:
        _check_one_batch(batch_sizes)
        check_chart(chart, force=force)
        check_output_file(chart, force=force)
    chosen = tuple(option_name(n) for n in ("bits", "no_hadamard", "rules", *_CALIBRATION) if asked(n))
    quantisation = Quantisation(bits, not no_hadamard, rules, calib_size, num_inference_steps, chosen)
    results = []
    with (
        out.progress("rounds", (runs + warm_up) * len(batch_sizes)) as advance,
        bench_workspace(work_dir, force, lambda stage: advance(0, stage)) as space,
    ):
        for before, batch_size in enumerate(batch_sizes):
            result = measure(
                model,
                peers,
                space,
                float_model=float_model,
                quantisation=quantisation,
                timing=Timing(batch_size, threads, runs, warm_up),
                runtime=runtime,
                on_round=lambda done, past=before * (runs + warm_up): advance(past + done, "timing"),  # type: ignore[misc]
            )
            results.append(result)
    if chart is not None:
        save_chart(chart, results[0])
    if as_json and len(results) == 1:
        out.print_json(results[0].to_dict())
    elif as_json:
        out.print_json({"batches": [result.to_dict() for result in results]})
    else:
        for result in results:
            Console(width=max(200, out.console.width)).print(bench_table(result), soft_wrap=True)


def _check_one_batch(batch_sizes: tuple[int, ...]) -> None:
    """A chart shows one batch size.

    Raises:
        EvaluationError: for several.
    """
    from hqc.errors import EvaluationError

    if len(batch_sizes) > 1:
        found = f"shows one batch size, and --batch-size names {len(batch_sizes)}"
        raise EvaluationError("--chart", found, "Draw one batch size at a time.")


@contextmanager
def bench_workspace(folder: Path | None, force: bool, on_start: Callable[[str], None]) -> "Iterator[Workspace]":
    """The work folder, or a temporary one; every stage is a line with its seconds on standard error."""
    import tempfile

    from hqc.evaluation.workspace import Workspace

    if folder is not None:
        claim(folder, stays=True)
        yield Workspace(folder, force=force, on_start=on_start, on_end=say_stage)
        return
    with tempfile.TemporaryDirectory(prefix="hqc-bench-") as temporary:
        yield Workspace(Path(temporary), on_start=on_start, on_end=say_stage)
