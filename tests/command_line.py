"""One command of `hqc` in this process."""

from click.testing import CliRunner, Result

from hqc.cli import main

__all__ = ["hqc", "ok", "silently_ok"]


def hqc(*arguments: object) -> Result:
    """Runs it, however it ends."""
    return CliRunner(catch_exceptions=False).invoke(main, [str(argument) for argument in arguments])


def ok(*arguments: object) -> Result:
    """Runs it; it has to end well."""
    result = hqc(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def silently_ok(*arguments: object) -> Result:
    """The same, and nothing is said on stderr."""
    result = ok(*arguments)
    assert result.stderr == ""
    return result
