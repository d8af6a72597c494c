"""The command line: parse, call, print. Every command is a thin layer over the Python API."""

from typing import Any

import click

from hqc import __version__
from hqc.commands.analyze import analyze
from hqc.commands.bench import bench
from hqc.commands.compare import compare
from hqc.commands.compile import explain, export, inspect, trace
from hqc.commands.doctor import doctor
from hqc.commands.engine import build_engine
from hqc.commands.models import evaluate, sample, serve
from hqc.commands.quantise import ptq, qat
from hqc.commands.tune import tune
from hqc.errors import HqcError

__all__ = ["main"]


class _Commands(click.Group):
    """Turns errors that the user can act on into one line and exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HqcError as error:
            raise _UserError(str(error)) from error
        except BrokenPipeError:
            raise  # the reader has seen enough: click ends quietly
        except OSError as error:
            raise _UserError(
                f"{error.filename or 'file system'}: {error.strerror or error}. Check the path."
            ) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class _UserError(click.ClickException):
    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"hqc: {' '.join(self.format_message().split())}", err=True)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": lambda t: t.replace("_", "-")},
)
@click.version_option(__version__, prog_name="hqc")
def main() -> None:
    """Hadamard Quantisation Compiler: low-bit latent diffusion, from checkpoint to integer kernels."""


COMMANDS = (
    *(trace, explain, inspect, ptq, qat, export, build_engine, tune),
    *(sample, evaluate, analyze, compare, bench, serve, doctor),
)
for command in COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    main()
