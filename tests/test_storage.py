"""Programs on disk: what is written is read back bitwise; what is damaged or hostile is refused; no half artefacts."""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from zoo import ZOO, fingerprint

import hqc.atomic
import hqc.storage
from hqc.errors import ArtefactError
from hqc.graph_json import graph_from_json, graph_to_json
from hqc.passes import (
    AttachLora,
    FreezeIntegers,
    InsertHadamard,
    InsertQdq,
    PackInt4,
    RotateWeights,
    SelectLayers,
    SplitDigits,
)
from hqc.pipeline import run_pipeline
from hqc.program import Program
from hqc.storage import load_program, save_program
from hqc.text import graph_text

FILES = ("graph.json", "history.json", "manifest.json", "plan.json", "weights.safetensors")


@pytest.fixture(scope="session")
def integer(captured: Callable[[str], Program]) -> Program:
    chain = [SelectLayers(), InsertHadamard(), InsertQdq((0.0, 500.0)), FreezeIntegers()]
    return run_pipeline(captured("two_sites"), [*chain, RotateWeights(), SplitDigits(), PackInt4()])


@pytest.fixture
def artefact(integer: Program, tmp_path: Path) -> Path:
    save_program(integer, tmp_path / "tiny.hqc")
    return tmp_path / "tiny.hqc"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def resign(folder: Path) -> None:
    """Makes the manifest agree with the files again: what an attacker would do."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


# ---- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ZOO)
def test_round_trip_of_captured_programs(model: str, captured: Callable[[str], Program], tmp_path: Path) -> None:
    program = captured(model)
    save_program(program, tmp_path / "p.hqc")
    assert_same(load_program(tmp_path / "p.hqc"), program)


def test_round_trip_at_every_stage(captured: Callable[[str], Program], integer: Program, tmp_path: Path) -> None:
    quantised = run_pipeline(
        captured("shared_weights"),
        [SelectLayers(bits="w4a3"), InsertHadamard(), InsertQdq((0.0, 1.5)), AttachLora(rank=2)],
    )
    for i, program in enumerate((quantised, integer)):
        save_program(program, tmp_path / f"{i}.hqc")
        assert_same(load_program(str(tmp_path / f"{i}.hqc")), program)


def assert_same(loaded: Program, program: Program) -> None:
    assert graph_text(loaded) == graph_text(program)
    assert fingerprint(loaded) == fingerprint(program)
    assert (loaded.inputs, loaded.stage, loaded.plan, loaded.history) == (
        program.inputs,
        program.stage,
        program.plan,
        program.history,
    )
    assert loaded.origin == program.origin
    args = program.example_inputs(2)
    with torch.no_grad():
        assert torch.equal(loaded.module()(*args), program.module()(*args))


def test_records_of_earlier_versions_do_not_say_what_went(artefact: Path, integer: Program) -> None:
    records = json.loads((artefact / "history.json").read_text())
    assert all(record.pop("removed") == [] for record in records)
    (artefact / "history.json").write_text(json.dumps(records))
    resign(artefact)
    assert_same(load_program(artefact), integer)


def test_a_loaded_program_can_be_rewritten_further(captured: Callable[[str], Program], tmp_path: Path) -> None:
    chain = [SelectLayers(), InsertHadamard(), InsertQdq((0.0,)), AttachLora(rank=2)]
    program = captured("shared_weights")
    for i, one in enumerate(chain):
        program = run_pipeline(program, [one])
        save_program(program, tmp_path / f"{i}.hqc")
        program = load_program(tmp_path / f"{i}.hqc")
    direct = run_pipeline(captured("shared_weights"), chain)
    assert graph_text(program) == graph_text(direct)


def test_bytes_are_reproducible(integer: Program, tmp_path: Path) -> None:
    save_program(integer, tmp_path / "a.hqc")
    save_program(load_program(tmp_path / "a.hqc"), tmp_path / "b.hqc")
    assert tuple(contents(tmp_path / "a.hqc")) == FILES
    assert contents(tmp_path / "a.hqc") == contents(tmp_path / "b.hqc")


def test_tensors_that_share_memory_are_written_apart(captured: Callable[[str], Program], tmp_path: Path) -> None:
    program = captured("two_sites")
    state = dict(program.state)
    state["conv.bias"] = torch.cat([state["conv.bias"], torch.zeros(4)])[:16]
    base = torch.arange(30.0)
    state["conv.bias"], state["head.bias"] = base[2:18], base[10:15]
    save_program(program.evolve(state=state), tmp_path / "p.hqc")
    loaded = load_program(tmp_path / "p.hqc").state
    assert torch.equal(loaded["conv.bias"], base[2:18])
    assert torch.equal(loaded["head.bias"], base[10:15])


def test_odd_values_survive_the_text_form(captured: Callable[[str], Program]) -> None:
    graph = captured("two_sites").module().graph
    node = next(n for n in graph.nodes if n.op == "call_function")
    extra = [
        float("inf"),
        float("-inf"),
        1e-45,
        2**62,
        -(2**63),
        True,
        None,
        "same",
        torch.bfloat16,
        torch.device("cpu"),
    ]
    extra += [torch.channels_last, torch.strided, [], [[1, node]], -0.0]
    with graph.inserting_after(node):
        graph.call_function(torch.ops.aten.add.Tensor, (node, *extra))
    data = json.loads(json.dumps(graph_to_json(graph), allow_nan=False))
    again = graph_to_json(graph_from_json(data))
    assert again == graph_to_json(graph)


def test_not_a_number_survives_the_text_form(captured: Callable[[str], Program]) -> None:
    graph = captured("two_sites").module().graph
    node = next(n for n in graph.nodes if n.op == "call_function")
    node.args = (*node.args[:1], float("nan"))
    again = next(n for n in graph_from_json(graph_to_json(graph)).nodes if n.name == node.name)
    assert again.args[1] != again.args[1]


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in FILES if n != "manifest.json"])
def test_one_flipped_bit_is_found(name: str, artefact: Path) -> None:
    path = artefact / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match=r"is damaged: its sha256 is not the manifest's") as caught:
        load_program(artefact)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("name", [n for n in FILES if n != "manifest.json"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_truncated_file_is_found(name: str, keep: float, artefact: Path) -> None:
    path = artefact / name
    size = path.stat().st_size
    os.truncate(path, int(size * keep))
    with pytest.raises(
        ArtefactError, match=f"is truncated or changed: {int(size * keep)} bytes, the manifest says {size}"
    ):
        load_program(artefact)


@pytest.mark.parametrize("name", [n for n in FILES if n != "manifest.json"])
def test_a_missing_file_is_found(name: str, artefact: Path) -> None:
    (artefact / name).unlink()
    with pytest.raises(ArtefactError, match=r"is missing\. Copy the whole folder"):
        load_program(artefact)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", "\xff", '{"format": NaN}', "[" * 100_000], ids=lambda t: t[:8]
)
def test_a_damaged_manifest_is_found(text: str, artefact: Path) -> None:
    (artefact / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtefactError):
        load_program(artefact)


def test_every_flipped_bit_of_the_manifest_is_refused_or_harmless(artefact: Path) -> None:
    path, wanted = artefact / "manifest.json", load_program(artefact)
    data = path.read_bytes()
    refused = 0
    for i in range(0, len(data), 7):
        path.write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])
        try:
            found = load_program(artefact)
        except ArtefactError:
            refused += 1
        else:
            assert graph_text(found) == graph_text(wanted)
    assert refused > len(data) / 7 / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "has format version 2; this hqc reads 1"),
        (lambda m: m.update(version="1"), "has format version '1'; this hqc reads 1"),
        (lambda m: m.pop("version"), "has format version None; this hqc reads 1"),
        (lambda m: m.update(format="hqc-onnx"), "holds 'hqc-onnx'; expected 'hqc-program'"),
        (lambda m: m.pop("format"), "holds None; expected 'hqc-program'"),
        (lambda m: m.pop("files"), "lists no files"),
        (lambda m: m.update(files=[]), "lists no files"),
        (lambda m: m.update(files={}), "does not list graph.json"),
        (lambda m: m["files"].pop("plan.json"), "does not list plan.json"),
        (lambda m: m["files"].update({"../outside": {"size": 1, "sha256": ""}}), "names '../outside', outside itself"),
        (lambda m: m["files"].update({"a/../../b": {"size": 1, "sha256": ""}}), "names 'a/../../b', outside itself"),
        (
            lambda m: m["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}}),
            "names '/etc/passwd', outside itself",
        ),
        (lambda m: m["files"].update({"graph.json": None}), "names 'graph.json', outside itself"),
        (lambda m: m["files"].update({"a\0b": {"size": 1, "sha256": ""}}), "cannot read 'a\\x00b'"),
        (lambda m: m["files"].update({"x" * 5000: {"size": 1, "sha256": ""}}), "cannot read"),
        (lambda m: m.update(stage="finished"), "is not a program ('finished' is not a valid Stage)"),
        (lambda m: m.update(stage="captured"), "does not belong in a program that is captured"),
        (lambda m: m.pop("inputs"), "is not a program ('inputs')"),
        (lambda m: m["inputs"].pop(), "inputs are ['sample', 'timestep']"),
        (lambda m: m["inputs"][0].update(name="x"), "inputs are ['sample', 'timestep']"),
        (lambda m: m["inputs"][0].update(shape=["N", -1]), "input 'sample' has shape ['N', -1]"),
        (lambda m: m["inputs"][0].update(shape=["N", "M"]), "input 'sample' has shape ['N', 'M']"),
        (lambda m: m["inputs"][0].update(shape=[]), "input 'sample' has shape []"),
        (lambda m: m["inputs"][0].update(dtype="object"), "input 'sample' is 'object'"),
        (lambda m: m["origin"].update(extra=1), "is not a program"),
        (lambda m: m.update(origin=None), "is not a program"),
    ],
    ids=range(26),
)
def test_a_manifest_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, artefact: Path
) -> None:
    edit_manifest(artefact, change)
    with pytest.raises(ArtefactError, match=re.escape(message)):
        load_program(artefact)


def test_a_file_behind_a_link_is_refused(artefact: Path, tmp_path: Path) -> None:
    shutil.move(artefact / "plan.json", tmp_path / "elsewhere.json")
    (artefact / "plan.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ArtefactError, match="is a link"):
        load_program(artefact)


def test_a_folder_behind_a_link_is_refused(artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("x")
    (artefact / "pipeline").symlink_to(tmp_path / "secret")
    edit_manifest(artefact, lambda m: m["files"].update({"pipeline/key": {"size": 1, "sha256": ""}}))
    with pytest.raises(ArtefactError, match="is a link"):
        load_program(artefact)


def test_what_is_no_artefact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no such folder"):
        load_program(tmp_path / "none.hqc")
    with pytest.raises(ArtefactError, match=r"has no manifest\.json"):
        load_program(tmp_path)
    (tmp_path / "file.hqc").write_text("x")
    with pytest.raises(ArtefactError, match="no such folder"):
        load_program(tmp_path / "file.hqc")


# ---- hostile graphs ------------------------------------------------------------------------------------------------

CANARY: list[str] = []


def nodes_of(artefact: Path) -> list[dict[str, Any]]:
    return json.loads((artefact / "graph.json").read_text())["nodes"]  # type: ignore[no-any-return]


def write_nodes(artefact: Path, nodes: object) -> None:
    (artefact / "graph.json").write_text(json.dumps({"nodes": nodes}))
    resign(artefact)


def first(nodes: list[dict[str, Any]], op: str) -> dict[str, Any]:
    return next(n for n in nodes if n["op"] == op)


def called(target: str) -> Callable[[list[dict[str, Any]]], object]:
    return lambda nodes: first(nodes, "call_function").update(target=target)


INJECTED = "__import__('test_storage').CANARY.append('ran')"
HOSTILE: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "call_module": (lambda n: first(n, "call_function").update(op="call_module"), "has op 'call_module'"),
    "call_method": (lambda n: first(n, "call_function").update(op="call_method"), "has op 'call_method'"),
    "eval": (called("builtins.eval"), "'builtins.eval' is not one that a graph may call"),
    "system": (called("os.system"), "'os.system' is not one that a graph may call"),
    "load": (called("torch.load"), "'torch.load' is not one that a graph may call"),
    "hub": (called("torch.hub.load"), "is not one that a graph may call"),
    "other namespace": (called("prims.add.default"), "is not one that a graph may call"),
    "no such operator": (called("aten.no_such.default"), "no_such"),
    "no such overload": (called("aten.add.no_such"), "no_such"),
    "dunder packet": (called("aten.__class__.__init__"), "is not an operator"),
    "dunder overload": (called("aten.add.__class__"), "is not an operator"),
    "overload attribute": (called("aten.add.op"), "is not an operator"),
    "in place": (called("aten.add_.Tensor"), "changes its arguments or touches files"),
    "out variant": (called("aten.add.out"), "changes its arguments or touches files"),
    "resize": (called("aten.resize_.default"), "changes its arguments or touches files"),
    "from_file": (called("aten.from_file.default"), "changes its arguments or touches files"),
    "target number": (lambda n: first(n, "call_function").update(target=5), "is not a program"),
    "name with code": (lambda n: first(n, "call_function").update(name=f"x = {INJECTED}; y"), "is not an identifier"),
    "name keyword": (lambda n: first(n, "call_function").update(name="import"), "is not an identifier"),
    "name number": (lambda n: first(n, "call_function").update(name=5), "is not a program"),
    "input with code": (
        lambda n: first(n, "placeholder").update(target=f"sample={INJECTED}"),
        "its name cannot be used",
    ),
    "input default": (lambda n: first(n, "placeholder").update(args=[1]), "its name cannot be used"),
    "weight with code": (
        lambda n: first(n, "get_attr").update(target=f'w", {INJECTED}) or (self, "w'),
        "does not take",
    ),
    "weight dunder": (lambda n: first(n, "get_attr").update(target="forward.__globals__"), "are missing"),
    "site with code": (
        lambda n: first(n, "call_function")["meta"].update(site=f'a", {INJECTED}), "b'),
        "does not take",
    ),
    "kwarg with code": (
        lambda n: first(n, "call_function").update(kwargs={f"a={INJECTED}, b": 1}),
        "not an identifier",
    ),
    "unknown node": (lambda n: first(n, "call_function").update(args=[{"node": "nobody"}]), "nobody"),
    "itself": (
        lambda n: first(n, "call_function").update(args=[{"node": first(n, "call_function")["name"]}]),
        "is not a program",
    ),
    "later node": (lambda n: first(n, "call_function").update(args=[{"node": n[-2]["name"]}]), "is not a program"),
    "twice": (lambda n: n.insert(1, n[0]), "two nodes are called"),
    "unknown kind": (lambda n: first(n, "call_function").update(args=[{"lambda": "x"}]), "lambda"),
    "two kinds": (lambda n: first(n, "call_function").update(args=[{"node": "a", "float": "1"}]), "is not a program"),
    "no kind": (lambda n: first(n, "call_function").update(args=[{}]), "is not a program"),
    "dtype": (lambda n: first(n, "call_function").update(args=[{"dtype": "hub"}]), "'hub' is not a torch.dtype"),
    "dtype dunder": (lambda n: first(n, "call_function").update(args=[{"dtype": "__dict__"}]), "is not a torch.dtype"),
    "device": (lambda n: first(n, "call_function").update(args=[{"device": "toaster"}]), "toaster"),
    "float": (lambda n: first(n, "call_function").update(args=[{"float": "one"}]), "one"),
    "huge integer": (lambda n: first(n, "call_function").update(args=[2**63]), "does not fit 64 bits"),
    "huger integer": (lambda n: first(n, "call_function").update(args=[10**4000]), "does not fit 64 bits"),
    "no output": (lambda n: n.pop(), "is not a program"),
    "nothing": (lambda n: n.clear(), "is not a program"),
    "no meta": (lambda n: n[0].pop("meta"), "meta"),
    "args text": (lambda n: first(n, "call_function").update(args="sample"), "is not a program"),
    "args none": (lambda n: first(n, "call_function").update(args=None), "is not a program"),
    "site number": (lambda n: first(n, "call_function")["meta"].update(site=3), "is not a program"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_graph_is_refused(case: str, artefact: Path) -> None:
    change, message = HOSTILE[case]
    nodes = nodes_of(artefact)
    change(nodes)
    write_nodes(artefact, nodes)
    CANARY.clear()
    with pytest.raises(ArtefactError, match=re.escape(message)):
        load_program(artefact)
    assert not CANARY


@pytest.mark.parametrize("nodes", [None, 5, {}, {"a": 1}, [1], [None], [[]], "nodes"], ids=repr)
def test_what_is_no_list_of_nodes_is_refused(nodes: object, artefact: Path) -> None:
    write_nodes(artefact, nodes)
    with pytest.raises(ArtefactError):
        load_program(artefact)


@pytest.mark.parametrize("depth", [300, 900, 5_000, 200_000])
def test_deep_nesting_is_refused(depth: int, artefact: Path) -> None:
    nodes = nodes_of(artefact)
    first(nodes, "call_function")["args"] = ["@"]
    text = json.dumps({"nodes": nodes}).replace('"@"', "[" * depth + "]" * depth)
    (artefact / "graph.json").write_text(text)
    resign(artefact)
    with pytest.raises(ArtefactError):
        load_program(artefact)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_are_no_json_are_refused(constant: str, artefact: Path) -> None:
    nodes = nodes_of(artefact)
    first(nodes, "call_function")["args"] = ["@"]
    (artefact / "graph.json").write_text(json.dumps({"nodes": nodes}).replace('"@"', constant))
    resign(artefact)
    with pytest.raises(ArtefactError, match=f"{constant} is not JSON"):
        load_program(artefact)


def test_hostile_names_would_run_without_the_check() -> None:
    """The danger is real: fx writes names into the source that it executes."""
    CANARY.clear()
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.target = f"x={INJECTED}"
    graph.output(node)
    torch.fx.GraphModule(torch.nn.Module(), graph)
    assert CANARY == ["ran"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("plan.json", "{}", "not a quantisation plan"),
        ("plan.json", "[]", "not a quantisation plan"),
        ("plan.json", "{", "cannot be read"),
        ("history.json", '[{"text": "x"}]', "is not a program"),
        ("history.json", "5", "is not a program"),
        ("weights.safetensors", "not tensors", "is not a program"),
        ("weights.safetensors", "", "is not a program"),
    ],
)
def test_other_files_that_do_not_fit_are_refused(name: str, text: str, message: str, artefact: Path) -> None:
    (artefact / name).write_text(text)
    resign(artefact)
    with pytest.raises(ArtefactError, match=message):
        load_program(artefact)


def test_weights_that_do_not_fit_the_graph_are_refused(artefact: Path) -> None:
    path = artefact / "weights.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k != "conv.bias"}, path)
    resign(artefact)
    with pytest.raises(ArtefactError, match=r"weights conv\.bias are missing"):
        load_program(artefact)
    safetensors.torch.save_file({**tensors, "conv.bias": torch.zeros(3)}, path)
    resign(artefact)
    with pytest.raises(ArtefactError, match=r"weight conv\.bias is \[3\]; the graph says \[16\]"):
        load_program(artefact)
    safetensors.torch.save_file({**tensors, "conv.activation_scale_table": torch.tensor([1.0, float("nan")])}, path)
    resign(artefact)
    with pytest.raises(ArtefactError, match="has a scale that is not positive and finite"):
        load_program(artefact)


# ---- writing -------------------------------------------------------------------------------------------------------


def test_an_artefact_is_not_overwritten_without_force(artefact: Path, captured: Callable[[str], Program]) -> None:
    kept = contents(artefact)
    with pytest.raises(ArtefactError, match=r"already exists\. Give --force to replace it"):
        save_program(captured("geometry"), artefact)
    assert contents(artefact) == kept
    save_program(captured("geometry"), artefact, force=True)
    assert graph_text(load_program(artefact)) == graph_text(captured("geometry"))
    assert [p.name for p in artefact.parent.iterdir()] == [artefact.name]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_hqc_did_not_write_is_never_replaced(force: bool, integer: Program, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    for target in (home, home / "thesis.txt"):
        with pytest.raises(ArtefactError, match="exists and was not written by hqc"):
            save_program(integer, target, force=force)
    (home / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(ArtefactError, match="exists and was not written by hqc"):
        save_program(integer, home, force=force)
    assert (home / "thesis.txt").read_text() == "years of work"


def test_a_dangling_link_is_not_replaced(integer: Program, tmp_path: Path) -> None:
    (tmp_path / "link.hqc").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match="exists and was not written by hqc"):
        save_program(integer, tmp_path / "link.hqc", force=True)


def test_a_link_to_an_artefact_is_replaced_but_not_what_it_points_to(
    artefact: Path, captured: Callable[[str], Program]
) -> None:
    link, kept = artefact.with_name("link.hqc"), contents(artefact)
    link.symlink_to(artefact)
    save_program(captured("geometry"), link, force=True)
    assert not link.is_symlink()
    assert contents(artefact) == kept
    assert sorted(p.name for p in artefact.parent.iterdir()) == ["link.hqc", "tiny.hqc"]


def test_missing_parents_are_made(integer: Program, tmp_path: Path) -> None:
    save_program(integer, tmp_path / "a" / "b" / "p.hqc")
    assert load_program(tmp_path / "a" / "b" / "p.hqc").stage == integer.stage


def test_a_parent_that_is_a_file_is_refused(integer: Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtefactError, match="cannot be written"):
        save_program(integer, tmp_path / "file" / "p.hqc")


def test_an_unwritable_parent_is_refused(integer: Program, tmp_path: Path) -> None:
    parent = tmp_path / "locked"
    parent.mkdir(mode=0o555)
    if os.access(parent, os.W_OK):
        # Root may write anywhere; the kernel's own read-only tree refuses root too.
        parent = Path("/proc")
    with pytest.raises(ArtefactError, match=r"cannot be written \(.*\)\. Choose a writable folder\."):
        save_program(integer, parent / "p.hqc")


WRITERS = {
    "text": (Path, "write_text"),
    "tensors": (hqc.storage, "save_file"),
    "fsync": (os, "fsync"),
    "rename": (hqc.atomic, "rename_new"),
}


@pytest.mark.parametrize("old", [False, True], ids=["new", "over"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_artefact_and_nothing_else(
    writer: str,
    old: bool,
    integer: Program,
    captured: Callable[[str], Program],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "p.hqc"
    if old:
        save_program(captured("geometry"), target)
    kept = contents(tmp_path)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*WRITERS[writer], full)
        with pytest.raises(
            ArtefactError, match=r"could not be written \(.*No space left on device\)\. Free some space"
        ):
            save_program(integer, target, force=True)
    assert contents(tmp_path) == kept
    assert [p.name for p in tmp_path.iterdir()] == (["p.hqc"] if old else [])


@pytest.mark.parametrize("limit", [100, 9_000, 18_000])
def test_a_file_that_the_system_refuses_to_grow(limit: int, captured: Callable[[str], Program], tmp_path: Path) -> None:
    """The real thing: the kernel stops the write, in Python's files and in safetensors' own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(ArtefactError, match="could not be written"):
            save_program(captured("two_sites"), tmp_path / "p.hqc")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


def killed_while_saving(program: Program, target: Path, where: str, count: int) -> int:
    """Saves in a copy of this process, which ends by SIGKILL in a function's call of that number: its status."""
    child = os.fork()
    if child == 0:
        try:
            holder, name = where.rsplit(".", 1)
            module, calls = sys.modules[holder], []
            real = getattr(module, name)

            def stop(*args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                if len(calls) == count:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            setattr(module, name, stop)
            save_program(program, target, force=True)
        finally:
            os._exit(3)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize(
    ("where", "count"), [("hqc.storage.save_file", 1), ("hqc.atomic.sync", 3)], ids=["tensors", "fsync"]
)
def test_a_killed_save_leaves_the_old_artefact(
    where: str, count: int, artefact: Path, captured: Callable[[str], Program], tmp_path: Path
) -> None:
    target = tmp_path / "old.hqc"
    save_program(captured("geometry"), target)
    kept = contents(target)
    status = killed_while_saving(load_program(artefact), target, where, count)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert contents(target) == kept
    assert graph_text(load_program(target)) == graph_text(captured("geometry"))
    # What the killed run left is hidden, does not stop the next one, and is cleared away by it.
    assert any(p.name.startswith(".old.hqc.hqc-") for p in tmp_path.iterdir())
    save_program(load_program(artefact), target, force=True)
    assert graph_text(load_program(target)) == graph_text(load_program(artefact))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.hqc", "tiny.hqc"]


def pipeline_source(folder: Path) -> Path:
    """A pipeline with a VAE, as far as copying looks at it, and what else a user's folder holds."""
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    for name in (
        ".git/config",
        "logs/private.txt",
        "unet/config.json",
        "vae/config.json",
        "vae/old.bin",
        "v1.safetensors",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    safetensors.torch.save_file({"x": torch.ones(2)}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


COPIED = ["model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]


def test_the_pipeline_around_the_denoiser_is_copied_without_it(integer: Program, tmp_path: Path) -> None:
    source = pipeline_source(tmp_path / "source")
    save_program(integer, tmp_path / "p.hqc", pipeline=source)
    assert list(contents(tmp_path / "p.hqc" / "pipeline")) == COPIED
    load_program(tmp_path / "p.hqc")
    # What somebody adds to it goes no further.
    (tmp_path / "p.hqc" / "pipeline" / "notes.txt").write_text("mine")
    save_program(integer, tmp_path / "next.hqc", pipeline=tmp_path / "p.hqc" / "pipeline")
    assert list(contents(tmp_path / "next.hqc" / "pipeline")) == COPIED
    (tmp_path / "p.hqc" / "pipeline" / "vae" / "config.json").write_text("vae/c0nfig.json")
    with pytest.raises(ArtefactError, match="is damaged"):
        load_program(tmp_path / "p.hqc")


def test_a_program_inside_its_pipeline_is_refused(integer: Program, tmp_path: Path) -> None:
    source = pipeline_source(tmp_path / "source")
    before = contents(source)
    with pytest.raises(ArtefactError, match="lies inside"):
        save_program(integer, source / "p.hqc", pipeline=source)
    assert contents(source) == before


def test_the_modes_of_a_source_are_not_copied(integer: Program, tmp_path: Path) -> None:
    source = pipeline_source(tmp_path / "source")
    for path in (*source.rglob("*"), source):
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        save_program(integer, tmp_path / "p.hqc", pipeline=source)
    finally:
        for path in (source, *(path for path in source.rglob("*") if path.is_dir())):
            path.chmod(0o700)
    usual = {True: 0o755, False: 0o644}
    umask = 0o777 & ~(tmp_path / "p.hqc").stat().st_mode & 0o022
    for path in (tmp_path / "p.hqc").rglob("*"):
        assert path.stat().st_mode & 0o777 == usual[path.is_dir()] & ~umask, path


def test_a_file_of_the_pipeline_that_cannot_be_read_is_named(
    integer: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pipeline_source(tmp_path / "source")
    real = Path.open

    def denied(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == source / "vae" / "config.json":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ArtefactError, match=r"vae/config\.json: cannot be read \(Permission denied\)"):
        save_program(integer, tmp_path / "p.hqc", pipeline=source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
