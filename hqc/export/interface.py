"""What the inputs and the output of an exported file are called: as hqc calls them, or as optimum does.

| hqc | optimum, UNets | optimum, transformers |
|---|---|---|
| sample | sample | hidden_states |
| condition | encoder_hidden_states | encoder_hidden_states |
| timestep, text_embeds, class_labels, … | the same | the same |
| output | out_sample | out_hidden_states |

The decoder of an autoencoder has optimum's latent_sample and sample, the encoder sample and latent_parameters.

Everything before and after the file keeps hqc's names; the manifest says what the file's are. Importing this loads
nothing heavy: the process that times a model does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from hqc.errors import ArtefactError, ExportError

if TYPE_CHECKING:
    from hqc.program import InputSpec

__all__ = ["OUTPUT", "Interface", "Names", "interface_for", "interface_of", "rename_ports"]

OUTPUT = "output"
Names = Literal["hqc", "optimum"]
T = TypeVar("T")


@dataclass(frozen=True)
class Interface:
    """The file's name of every input that it calls otherwise than hqc, and of the output."""

    inputs: Mapping[str, str] = field(default_factory=dict)
    output: str = OUTPUT

    def name(self, ours: str) -> str:
        """The file's name of an input."""
        return self.inputs.get(ours, ours)

    def feeds(self, named: Mapping[str, T]) -> dict[str, T]:
        """Values under the file's names."""
        return {self.name(ours): value for ours, value in named.items()}

    def renamings(self) -> dict[str, str]:
        """hqc's name -> the file's, of all that differ, the output too."""
        names = {**self.inputs, OUTPUT: self.output}
        return {ours: theirs for ours, theirs in names.items() if ours != theirs}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return {"inputs": dict(self.inputs), "output": self.output}


_HALVES = {
    "AutoencoderKL.decoder": Interface({"sample": "latent_sample"}, "sample"),
    "AutoencoderKL.encoder": Interface({}, "latent_parameters"),
}


def interface_for(names: Names, inputs: "Sequence[InputSpec]", config: Mapping[str, Any], kind: str = "") -> Interface:
    """The interface of a program.

    config: of its denoiser; one of no class that hqc knows has a UNet's names. kind: of its origin, which tells the
    halves of an autoencoder apart.

    Raises:
        ExportError: for names that do not exist, or where two values would have one name.
    """
    if names not in get_args(Names):
        raise ExportError(f"names {names!r}", f"unknown; there are {', '.join(get_args(Names))}", "Use one of them.")
    if names == "hqc":
        return Interface()
    if kind in _HALVES:
        return _HALVES[kind]
    from hqc.capture.families import FAMILIES

    family = FAMILIES.get(str(config.get("_class_name", "")), FAMILIES["UNet2DConditionModel"])
    spelled = {"sample": family.first, "condition": "encoder_hidden_states"}
    ours = [spec.name for spec in inputs]
    found = Interface({name: spelled[name] for name in ours if spelled.get(name, name) != name}, f"out_{family.first}")
    theirs = [*map(found.name, ours), found.output]
    if twice := [name for name in theirs if theirs.count(name) > 1]:
        raise ExportError(f"names {names}", f"two values would be called {twice[0]}", "Export with --names hqc.")
    return found


def interface_of(manifest: Mapping[str, Any], where: Path | str) -> Interface:
    """The interface that an export's manifest tells; hqc's own names where it tells none.

    Raises:
        ArtefactError: if it is none.
    """
    data = manifest.get("names", {})
    inputs, output = (data.get("inputs", {}), data.get("output", OUTPUT)) if isinstance(data, dict) else (None, None)
    if not isinstance(inputs, dict) or not all(isinstance(v, str) and v for v in (*inputs, *inputs.values(), output)):
        raise ArtefactError(str(where), "has a manifest whose names of inputs are none", "Export it again.")
    return Interface(inputs, str(output))


def rename_ports(model: Path, interface: Interface, *, back: bool = False) -> None:
    """Gives the inputs and the output of a file their names. back: gives a file that has them hqc's again.

    Names change places, so that a value inside that has one already gets one that is free. Weights in a file of their
    own stay there.
    """
    import onnx

    pairs = interface.renamings()
    swapped = {**_freed(pairs), **pairs}
    if back:
        swapped = {theirs: ours for ours, theirs in swapped.items()}
    if not swapped:
        return
    proto = onnx.load(str(model), load_external_data=False)
    graph = proto.graph
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [swapped.get(name, name) for name in values]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = swapped.get(value.name, value.name)
    onnx.save(proto, str(model))


def _freed(pairs: Mapping[str, str]) -> dict[str, str]:
    """What the names that are taken, and given up by no one, become: those given up, along each chain of names."""
    came_from = {theirs: ours for ours, theirs in pairs.items()}
    found = {}
    for last in came_from.keys() - pairs.keys():
        first = last
        while first in came_from:
            first = came_from[first]
        found[last] = first
    return found
