"""A program against an export: the exported graph's own values at every site that it still shows.

A site's output carries the site's name in the exported graph. Where the program lowers to the very graph of the file,
the inputs of its sites are known too, and the error that a site makes is torch's site on the runtime's own input.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from hqc.errors import ComparisonError, HqcError
from hqc.evaluation.layer_errors import (
    Comparison,
    LayerError,
    Replay,
    Watched,
    check_inputs,
    error_numbers,
    watch,
)
from hqc.export.artefact import EXPORT_KIND
from hqc.export.interface import Interface, interface_of, rename_ports
from hqc.export.lowering import OUTPUT, Listen, Tap
from hqc.export.model import DATA_FILE, MODEL_FILE, onnx_from_program
from hqc.export.prepare import prepare
from hqc.export.watched import WatchedModel, heard
from hqc.program import InputSpec, Program
from hqc.sites import branch_name, output_of, quantised_sites, residual_name
from hqc.storage import check_manifest

__all__ = ["compare_export"]

_GROUP_BYTES = 2**28
_NOT_THERE = "not in the graph"
_NO_INPUTS = "made: not measured, because A does not lower to the graph of the export"
_OTHER_LAYOUT = "has another layout in the graph"


@dataclass(frozen=True)
class _Made:
    """How an export says that it was made."""

    target: str
    opset: int
    functions: bool


@dataclass(frozen=True)
class _Listening:
    """Where to listen: outputs by site; inputs of quantised sites where the graph is the program's own."""

    outputs: Mapping[str, Listen]
    inputs: Mapping[str, Listen] = field(default_factory=dict)
    own: bool = True


def compare_export(program: Program, folder: Path, args: Sequence[Tensor]) -> Comparison:
    """An export against a program on the same inputs, at every site that the exported graph shows.

    Raises:
        ComparisonError: if it takes other inputs or shows no site of the program. ArtefactError: a damaged folder.
    """
    manifest = check_manifest(folder, EXPORT_KIND)
    try:
        inputs = tuple(InputSpec.from_dict(spec) for spec in manifest["inputs"])
        made = _Made(str(manifest["target"]), int(manifest["opset"]), manifest.get("functions") is True)
    except (KeyError, TypeError, ValueError) as error:
        raise ComparisonError(str(folder), f"has an incomplete manifest ({error})", "Export it again.") from error
    check_inputs(program.inputs, inputs)
    interface = interface_of(manifest, folder)
    with _copied(folder) as model:
        _with_own_names(model, interface)
        listening = _listening(program, model, made)
        if not listening.outputs:
            raise ComparisonError(str(folder), "shows no site of the program", "Give an export of the same source.")
        return _compare(program, model, listening, args)


def _compare(program: Program, model: Path, listening: _Listening, args: Sequence[Tensor]) -> Comparison:
    feeds = {spec.name: arg.numpy() for spec, arg in zip(program.inputs, args, strict=True)}
    taken = {value.name for value in onnx.load(str(model), load_external_data=False).graph.input}
    feeds = {name: array for name, array in feeds.items() if name in taken}
    behind_smoothing = {site.site: site.x for site in quantised_sites(program)}
    replay, found, output = Replay(program, args, behind_smoothing), list[LayerError](), None
    heard_at = [*listening.outputs.values(), *listening.inputs.values()]
    with WatchedModel(model, [], values={listen.name for listen in heard_at}) as export:
        for group in _groups(watch(program, args)):
            seen = [one for one in group if isinstance(one, Watched)]
            tables = (listening.outputs, listening.inputs)
            listens = [table[s.site] for s in seen for table in tables if s.site in table]
            last = [one for one in group if isinstance(one, Tensor)]
            names = {listen.name for listen in listens} | ({OUTPUT} if last else set())
            values = export.run(names, feeds) if names else {}
            found += [_site_error(one, listening, values, replay) for one in seen]
            if last:
                output = error_numbers(last[0], torch.from_numpy(values[OUTPUT]))
    assert output is not None
    unknown = "" if listening.own else _NO_INPUTS
    return Comparison(tuple(found), output, note=unknown)


def _groups(stream: Iterator[Watched | Tensor]) -> Iterator[list[Watched | Tensor]]:
    """Sites that are watched in one run of the export."""
    group: list[Watched | Tensor] = []
    room = _GROUP_BYTES
    for one in stream:
        group.append(one)
        room -= sum(t.numel() * t.element_size() for t in ((one.x, one.y) if isinstance(one, Watched) else (one,)))
        if room < 0:
            yield group
            group, room = [], _GROUP_BYTES
    if group:
        yield group


def _site_error(a: Watched, listening: _Listening, values: Mapping[str, Any], replay: Replay) -> LayerError:
    if a.site not in listening.outputs:
        return LayerError(a.site, note=_NOT_THERE)
    b = _laid_out(listening.outputs[a.site], values, a.y)
    if b is None:
        return LayerError(a.site, note=_OTHER_LAYOUT)
    arrives = error_numbers(a.y, b)
    x = _laid_out(listening.inputs[a.site], values, a.x) if a.site in listening.inputs else None
    return LayerError(a.site, arrives, None if x is None else error_numbers(replay(a.site, x), b))


def _laid_out(listen: Listen, values: Mapping[str, Any], like: Tensor) -> Tensor | None:
    """A watched value in torch's layout; without a known permutation, the layout that fits.

    Exports keep images with their channels last, and tokens as one row each. Where several layouts fit (C = H = W),
    the one nearer to torch's value is it: a wrong one is off by more than the value itself.
    """
    value = heard(listen, values)
    if listen.perm is not None:
        return value if value.shape == like.shape else None
    if like.ndim == 3 and value.shape[-1:] == like.shape[-1:] and value.numel() * like.shape[1] == like.numel():
        return value.reshape(len(like), 1, -1).expand_as(like)  # one row for all tokens
    if value.numel() != like.numel() or not value.ndim:
        return None
    choices = [value] if value.shape == like.shape else []
    if value.shape[-1] == like.shape[-1] and like.ndim != 4:
        choices.append(value.reshape(like.shape))
    if like.ndim == 4 and value.shape[-1] == like.shape[1]:
        n, c, h, w = like.shape
        choices.append(value.reshape(n, h, w, c).permute(0, 3, 1, 2))
    return min(choices, key=lambda choice: float((choice - like).norm())) if choices else None


# ---- where to listen -----------------------------------------------------------------------------------------------


def _listening(program: Program, model: Path, made: _Made) -> _Listening:
    names = _value_names(onnx.load(str(model), load_external_data=False).graph)
    outputs = {site: Listen(site) for site, _ in program.sites() if site in names}
    sums = ((site, name(site)) for site, _ in program.sites() for name in (residual_name, branch_name))
    whole = {site: Listen(found) for site, found in sums if found in names}
    # The network's output keeps its own name, also where it is a site's.
    for site, layer in program.sites():
        total = output_of(layer)
        if any(user.op == "output" for user in total.users):
            (outputs if total is layer else whole)[site] = Listen(OUTPUT)
    taps = _own_taps(program, names, made)
    if taps is None:
        return _Listening(outputs | whole, own=False)
    outputs |= {site: tap.output for site, tap in taps.items()}
    return _Listening(outputs | whole, {site: tap.input for site, tap in taps.items()})


def _value_names(graph: Any) -> set[str]:
    return {name for node in graph.node for name in node.output if name} | {value.name for value in graph.input}


def _own_taps(program: Program, names: set[str], made: _Made) -> Mapping[str, Tap] | None:
    """Where the program's own lowering listens, if that gives the graph of the file, value by value."""
    try:
        prepared = prepare(program, made.target)  # type: ignore[arg-type]
        model, taps = onnx_from_program(prepared, made.target, made.opset, functions=made.functions)  # type: ignore[arg-type]
    except HqcError:
        return None  # the file came from another program, whose sites are found by their names
    values = {str(v.name) for node in model.graph for v in node.outputs} | {str(v.name) for v in model.graph.inputs}
    return taps if values == names else None


@contextmanager
def _copied(folder: Path) -> Iterator[Path]:
    """The model in a folder of its own: watching writes beside it, and an artefact is not to be written into."""
    with tempfile.TemporaryDirectory(prefix="hqc-compare-") as temporary:
        for name in (MODEL_FILE, DATA_FILE):
            if (folder / name).is_file():
                _link_or_copy(folder / name, Path(temporary) / name)
        yield Path(temporary) / MODEL_FILE


def _with_own_names(model: Path, interface: Interface) -> None:
    """The copy under hqc's names; the file that it may be a link to stays as it is."""
    if not interface.renamings():
        return
    whole = model.with_suffix(".renamed")
    shutil.copyfile(model, whole)
    os.replace(whole, model)
    rename_ports(model, interface, back=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
