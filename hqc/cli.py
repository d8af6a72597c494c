"""The command line: parse, call, print. Every command is a thin layer over the Python API."""

import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from hqc import __version__
from hqc.commands.analyze import analyze
from hqc.commands.bench import bench
from hqc.commands.bench_serve import bench_serve
from hqc.commands.compare import compare
from hqc.commands.compare_recipes import compare_recipes
from hqc.commands.deploy import deploy
from hqc.commands.doctor import doctor
from hqc.commands.engine import build_engine
from hqc.commands.explain import explain, inspect
from hqc.commands.export import export
from hqc.commands.loras import attach_lora
from hqc.commands.models import evaluate, sample
from hqc.commands.qr_adaptor import qr_adaptor
from hqc.commands.quantise import ptq, qat
from hqc.commands.recipes import recipes
from hqc.commands.restore import restore
from hqc.commands.search import search
from hqc.commands.serve import serve
from hqc.commands.trace import trace
from hqc.commands.tune import tune
from hqc.errors import LONGEST_LINE, HqcError, is_memory_error
from hqc.output import OutputError, checked_stdout
from hqc.processes import is_first
from hqc.stages import reported
from hqc.wording import first_words, shortened

__all__ = ["main"]


# Where diffusers and transformers read, when they are imported, how much they say on standard error.
_LIBRARIES = ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY")


class _Commands(click.Group):
    """Turns errors that the user can act on into one line and exit status 2, and bugs into one and status 1.

    Output that cannot be written is one that the user can act on.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        for name in _LIBRARIES:
            os.environ.setdefault(name, "error")
        try:
            with checked_stdout():
                try:
                    return super().main(*args, **extra)
                finally:
                    sys.stdout.flush()
        except OutputError as error:
            _UserError(error.line).show()
            raise SystemExit(_UserError.exit_code) from error
        except Exception as error:
            if not extra.get("standalone_mode", True) or os.environ.get("HQC_TRACEBACK"):
                raise
            with suppress(OSError):
                click.echo(f"hqc: {_bug(error)}", err=True)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with reported():
                return super().invoke(ctx)
        except OutputError:
            raise  # see main
        except HqcError as error:
            raise _UserError(error.line) from error
        except click.ClickException as error:
            vars(error).update(message=shortened(error.message, LONGEST_LINE))  # it may quote what was typed
            raise
        except BrokenPipeError:
            raise  # the reader has seen enough: click ends quietly
        except OSError as error:
            raise _UserError(_of_the_system(error).line) from error
        except (MemoryError, RuntimeError) as error:
            if not is_memory_error(error):
                raise
            raise _UserError(_NO_MEMORY.line) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class _UserError(click.ClickException):
    exit_code = 2

    def show(self, file: Any = None) -> None:
        if not is_first():  # of several processes, all of which are refused alike
            return
        with suppress(OSError):  # standard error may be full too
            click.echo(f"hqc: {self.format_message()}", err=True)


_NO_MEMORY = HqcError("memory", "there is not enough of it", "Close other programs, or ask for less at once.")


def _of_the_system(error: OSError) -> HqcError:
    return HqcError(str(error.filename or "file system"), error.strerror or first_words(error), "Check the path.")


def _bug(error: Exception) -> str:
    """An error that no user can act on: what and where, in one line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}hqc{os.sep}" in f.filename]
    place = f", {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    found = f"{type(error).__name__}: {first_words(error)}{place}"
    return HqcError("internal error", found, "Report a bug; with HQC_TRACEBACK=1 it says more.").line


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": lambda t: t.replace("_", "-")},
)
@click.version_option(__version__, prog_name="hqc")
def main() -> None:
    """Hadamard Quantisation Compiler: low-bit latent diffusion, from checkpoint to integer kernels.

    Long work says its stage on standard error now and then; HQC_PROGRESS=0 turns that off.
    """


COMMANDS = (
    *(trace, explain, inspect, recipes, search, qr_adaptor, ptq, qat, attach_lora, export, build_engine, tune),
    *(sample, restore, evaluate, analyze, compare, compare_recipes, bench, serve, bench_serve, deploy, doctor),
)
for command in COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    main()
