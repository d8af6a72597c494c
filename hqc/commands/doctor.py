"""The command that looks at the machine: doctor."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from hqc.commands.applies import Command
from hqc.commands.options import json_option

if TYPE_CHECKING:
    from hqc.engines.doctor import Ability, Diagnosis

__all__ = ["doctor"]


@click.command(cls=Command)
@json_option
def doctor(as_json: bool) -> None:
    """Show what can be exported, built and run on this machine, what is missing, and how to install it."""
    from hqc.engines.doctor import diagnose
    from hqc.engines.environment import find_environment

    # Not hqc.console: it imports torch, which may be what is broken.
    diagnosis = diagnose(find_environment())
    if as_json:
        click.echo(json.dumps(diagnosis.to_dict(), indent=1))
        return
    _table("versions", _versions(diagnosis))
    _table("GPUs", _gpus(diagnosis))
    click.secho("what can be done here", bold=True)
    for ability in diagnosis.abilities:
        click.echo(f"  {'yes' if ability.ready else 'no ':<3}  {ability.kind:<6}  {ability.name}{_why(ability)}")
    click.secho("known-bad combinations", bold=True)
    for bad in diagnosis.known_bad:
        click.echo(f"  {bad.name}: {bad.effect}. Do: {bad.do}.")
    if not diagnosis.known_bad:
        click.echo("  none found")


def _table(title: str, values: Mapping[str, str]) -> None:
    click.secho(title, bold=True)
    width = max(map(len, values))
    for name, value in values.items():
        click.echo(f"  {name:<{width}}  {value}")


def _versions(diagnosis: "Diagnosis") -> dict[str, str]:
    said = diagnosis.environment.to_dict()
    found = {"hqc": said["hqc"], "python": f"{said['python']}, {said['system']} {said['machine']}"}
    found |= {name: version or "not installed" for name, version in said["versions"].items()}
    if found["torch"] != "not installed":
        found["torch"] += f", CUDA {said['torch_cuda']}" if said["torch_cuda"] else ", without CUDA"
    driver = said["cuda_driver"]
    found["CUDA driver"] = f"{driver['version'] or 'version unknown'}, CUDA {driver['cuda']}" if driver else "none"
    return found


def _gpus(diagnosis: "Diagnosis") -> dict[str, str]:
    from hqc.memory import bytes_text

    gpus = diagnosis.environment.driver.gpus if diagnosis.environment.driver else ()
    found = {f"{i}": f"{gpu.name}, {gpu.arch}, {bytes_text(gpu.memory_bytes)}" for i, gpu in enumerate(gpus)}
    return found or {"none": "no NVIDIA GPU, or no driver"}


def _why(ability: "Ability") -> str:
    """What is missing and how it is installed, or the note."""
    if ability.ready:
        return f" ({ability.note})" if ability.note else ""
    lines = f"; {', '.join(f'`{line}`' for line in ability.install)}" if ability.install else ""
    return f": needs {', '.join(ability.missing)}{lines}"
