"""Commands about recipes: list, show, export, schema."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import click

from hqc.commands.applies import Command
from hqc.commands.options import check_output_file, force_option, json_option

__all__ = ["recipes"]

_recipe_argument = click.argument("recipe", metavar="NAME|FILE.yaml")


@click.group(name="recipes")
def recipes() -> None:
    """The methods that hqc knows, as recipes: list them, show one, write one as YAML, print the files' schema."""


@recipes.command(name="list", cls=Command)
@json_option
def list_(as_json: bool) -> None:
    """List every recipe: name, kind, source."""
    from hqc import console as out
    from hqc.recipes import RECIPES

    rows = [{"name": r.name, "kind": r.kind, "source": r.source} for r in RECIPES.values()]
    if as_json:
        out.print_json(rows)
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        click.echo(f"{row['name']:<{width}}  {row['kind']}  {row['source']}")


@recipes.command(cls=Command)
@_recipe_argument
@json_option
def show(recipe: str, as_json: bool) -> None:
    """Show a recipe: what it computes, its sampler, and its steps with every option."""
    from hqc import console as out
    from hqc.recipes import find_recipe
    from hqc.steps import step_data, step_name

    found = find_recipe(recipe)
    if as_json:
        steps = [step_data(step) for step in found.steps]
        head = {"name": found.name, "kind": found.kind, "source": found.source, "doc": found.doc}
        out.print_json({**head, "sampler": found.sampler.settings(), "steps": steps})
        return
    click.echo(f"{found.name} ({found.kind}, {found.source})\n")
    if found.doc:
        click.echo(f"{found.doc.strip()}\n")
    for number, step in enumerate((found.sampler, *found.steps)):
        click.echo(f"{number}. {step_name(type(step))}" if number else "sampler")
        for line in _options(step):
            click.echo(f"     {line}")


def _options(step: Any) -> Iterator[str]:
    """Every option on a line of its own, and every part of one."""
    from hqc.steps import step_text, value_text

    for field in fields(step):
        value = getattr(step, field.name)
        if isinstance(value, tuple) and any(map(is_dataclass, value)):
            yield f"{field.name}:"
            yield from (f"  - {step_text(part)}" for part in value)
        else:
            yield f"{field.name}: {value_text(value)}"


@recipes.command(cls=Command)
@_recipe_argument
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="The file (default: standard output)."
)
@force_option
def export(recipe: str, output: Path | None, force: bool) -> None:
    """Write a recipe as YAML, to change and to give to --recipe."""
    from hqc.atomic import write_file
    from hqc.errors import OptionError
    from hqc.recipes import find_recipe
    from hqc.recipes.files import recipe_yaml

    if force and output is None:
        raise OptionError("--force", "replaces the file of --output, and none is asked for", "Leave it out.")
    text = recipe_yaml(find_recipe(recipe))
    if output is None:
        click.echo(text, nl=False)
        return
    check_output_file(output, force=force)
    write_file(output, text.encode())
    click.echo(f"wrote {output}")


@recipes.command(cls=Command)
def schema() -> None:
    """Print the JSON schema of recipe files, for editors."""
    from hqc import console as out
    from hqc.recipes.files import recipe_schema

    out.print_json(recipe_schema())
