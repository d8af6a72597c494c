"""Writes docs/cli.md from the command line's own help; a test checks that it is up to date."""

from pathlib import Path

import click

from hqc.cli import main as cli

TARGET = Path(__file__).resolve().parents[1] / "docs" / "cli.md"


def reference() -> str:
    """The help of every command, as Markdown."""
    parts = ["# Command line\n", "Written by `make docs` from `hqc COMMAND --help`; do not edit.\n"]
    root = click.Context(cli, info_name="hqc", terminal_width=100, max_content_width=100)
    parts.append(f"```text\n{cli.get_help(root)}\n```\n")
    parts += [_section(root, name, cli.commands[name]) for name in cli.list_commands(root)]
    return "\n".join(parts)


def _section(parent: click.Context, name: str, command: click.Command) -> str:
    """The help of one command, and of those in it."""
    context = click.Context(command, info_name=name, parent=parent, terminal_width=100, max_content_width=100)
    path = context.command_path.removeprefix("hqc ")
    own = f"## hqc {path}\n\n```text\n{command.get_help(context)}\n```\n"
    inner = command.commands if isinstance(command, click.Group) else {}
    return "\n".join([own, *(_section(context, sub, inner[sub]) for sub in inner)])


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
    print(f"wrote {TARGET.name}")
