"""The second stream of the GPU runtime, without a GPU: the order of the graph, its numbers, what is asked of CUDA."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_programs import quantised
from torch import fx, nn

from hqc.program import aten, is_op
from hqc.runtimes.integer.build import BuildOptions, integer_module
from hqc.runtimes.integer.cuda import side_stream
from hqc.runtimes.integer.cuda.side_stream import add_side_stream
from hqc.runtimes.integer.kernel_set import reference_kernels
from hqc.runtimes.integer.scales import look_up

CPU = torch.device("cpu")


def built(program, *, side: bool = True, dtype: torch.dtype = torch.float16) -> fx.GraphModule:
    return integer_module(program, reference_kernels(), BuildOptions(CPU, dtype, side_stream=side))


def marks(module: fx.GraphModule) -> list[str]:
    """The calls that change streams, in order."""
    return [str(n.target) for n in module.graph.nodes if str(n.target).startswith("side_")]


def between(module: fx.GraphModule, first: str, last: str) -> list[fx.Node]:
    nodes = list(module.graph.nodes)
    at = {str(n.target): i for i, n in enumerate(nodes)}
    return nodes[at[first] + 1 : at[last]]


def needs(node: fx.Node) -> set[str]:
    """The inputs that a node's values hang on; sizes do not count."""
    found, waiting, seen = set(), [node], set()
    while waiting:
        one = waiting.pop()
        if one in seen or is_op(one, aten.sym_size.int):
            continue
        seen.add(one)
        found |= {str(one.target)} if one.op == "placeholder" else set()
        waiting.extend(one.all_input_nodes)
    return found


# ---- order ---------------------------------------------------------------------------------------------------------


def test_the_order_of_a_conditional_unet(captured) -> None:
    """Scales, what hangs on the timestep, what hangs on the condition, then the image."""
    module = built(quantised(captured("cross_attention"), "w4a4"))
    nodes = list(module.graph.nodes)
    assert marks(module) == ["side_fork", "side_done_0", "side_done_1", "side_back", "side_wait_0", "side_wait_1"]
    fork = next(i for i, n in enumerate(nodes) if n.target == "side_fork")
    # The look-up of all scales and its rows come before anything forks; no kernel does.
    assert any(n.target is look_up for n in nodes[:fork])
    assert not any(n.op == "call_module" for n in nodes[:fork])
    assert all(i < fork for i, n in enumerate(nodes) if any(x.target is look_up for x in n.all_input_nodes))
    groups = [between(module, "side_fork", "side_done_0"), between(module, "side_done_0", "side_done_1")]
    kernels = [[n for n in group if n.op == "call_module"] for group in groups]
    # The embedding (a quantiser, two products), a pair for each of eight blocks; all keys and values of the condition.
    assert [len(k) for k in kernels] == [3 + 2 * 8, 2]
    assert all(needs(n) == {"timestep"} for n in kernels[0])
    assert all("condition" in needs(n) for n in kernels[1])
    image = [n for n in nodes[nodes.index(groups[1][-1]) :] if n.op == "call_module" and n.all_input_nodes]
    assert all("sample" in needs(n) for n in image)


@pytest.mark.parametrize("name", ["cross_attention", "unconditional", "without_attention"])
def test_a_group_is_awaited_right_before_its_first_reader(captured, name: str) -> None:
    module = built(quantised(captured(name), "w4a4"))
    nodes = list(module.graph.nodes)
    starts = ["side_fork", "side_done_0", "side_done_1"]
    count = sum(mark.startswith("side_done") for mark in marks(module))
    assert count == (2 if name == "cross_attention" else 1)
    for index in range(count):
        group = set(between(module, starts[index], f"side_done_{index}"))
        back = next(i for i, n in enumerate(nodes) if n.target == "side_back")
        reader = next(n for n in nodes[back:] if group & set(n.all_input_nodes))
        waits = [n for n in nodes[back : nodes.index(reader)] if n.target == f"side_wait_{index}"]
        assert len(waits) == 1
        assert all(str(n.target).startswith("side_wait") for n in nodes[nodes.index(waits[0]) : nodes.index(reader)])


@pytest.mark.parametrize("name", ["cross_attention", "unconditional", "without_attention"])
def test_the_same_bits_in_another_order(captured, name: str) -> None:
    program = quantised(captured(name), "w4a4")
    module, plain = built(program), built(program, side=False)
    assert marks(module)
    assert not marks(plain)
    for seed in (1, 2):
        inputs = program.example_inputs(2, seed=seed)
        assert torch.equal(module(*inputs), plain(*inputs))


def test_too_little_beside_the_image(captured) -> None:
    """Models whose image needs everything, or nearly."""
    for name in ("two_sites", "single_key", "shared_input"):
        module = built(quantised(captured(name), "w4a4"))
        assert not marks(module)


# ---- graphs made up ------------------------------------------------------------------------------------------------


class Add(nn.Module):
    """Stands for a kernel."""

    def forward(self, *terms: torch.Tensor) -> torch.Tensor:
        return sum(terms[1:], terms[0] * 1.5)


def made_up(inputs: list[str], wiring: list[list[int]]) -> tuple[fx.Graph, dict[str, nn.Module]]:
    """A graph of kernels, each reading some of the nodes before it; the last kernels' sum is the output."""
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in inputs]
    modules: dict[str, nn.Module] = {}
    for i, reads in enumerate(wiring):
        modules[f"k{i}"] = Add()
        nodes.append(graph.call_module(f"k{i}", tuple(nodes[r % len(nodes)] for r in reads)))
    modules["last"] = Add()
    unread = [n for n in nodes if not n.users]
    graph.output(graph.call_module("last", tuple(unread)))
    return graph, modules


def module_of(graph: fx.Graph, modules: dict[str, nn.Module]) -> fx.GraphModule:
    root = nn.Module()
    for name, module in modules.items():
        root.add_module(name, module)
    return fx.GraphModule(root, graph)


WIRING = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=1, max_size=14)


@settings(max_examples=60, deadline=None)
@given(WIRING)
def test_any_graph_keeps_its_numbers(wiring: list[list[int]]) -> None:
    """Every node after what it reads, every group awaited before the main stream reads it, the output after all."""
    inputs = [torch.tensor(float(i + 1)) for i in range(3)]
    wanted = module_of(*made_up(["sample", "timestep", "condition"], wiring))(*inputs)
    graph, modules = made_up(["sample", "timestep", "condition"], wiring)
    count = add_side_stream(graph, modules, "sample", CPU)
    graph.lint()
    module = module_of(graph, modules)
    assert torch.equal(module(*inputs), wanted)
    assert bool(marks(module)) == (count > 0)
    if not count:
        return
    nodes, group_of, awaited = list(module.graph.nodes), {}, set()
    group, aside = 0, False
    for node in nodes:
        name = str(node.target)
        if name.startswith("side_done"):
            group += 1
        elif name in ("side_fork", "side_back"):
            aside = name == "side_fork"
        elif name.startswith("side_wait"):
            awaited.add(int(name[-1]))
        elif aside:
            assert "sample" not in needs(node)
            group_of[node] = group
        else:
            assert {group_of[i] for i in node.all_input_nodes if i in group_of} <= awaited
    assert awaited == set(range(group))
    assert sum(n.op == "call_module" for n in group_of) == count


def with_sizes() -> tuple[fx.Graph, dict[str, nn.Module]]:
    """Four kernels of the timestep as often as the image has samples; two of the image, whose rows are counted too."""
    graph = fx.Graph()
    sample, timestep = graph.placeholder("sample"), graph.placeholder("timestep")
    size = graph.call_function(aten.sym_size.int, (sample, 0))
    vector = graph.call_function(aten.expand.default, (timestep, [size]))
    for i in range(4):
        vector = graph.call_module(f"k{i}", (vector,))
    rows = graph.call_function(aten.reshape.default, (graph.call_module("first", (sample,)), [size, -1]))
    graph.output(graph.call_module("second", (rows, graph.call_function(aten.unsqueeze.default, (vector, 1)))))
    return graph, {name: Add() for name in ("k0", "k1", "k2", "k3", "first", "second")}


def test_sizes_of_inputs_are_no_work() -> None:
    """Neither do they make their readers the image's, nor does anybody wait for them."""
    inputs = (torch.rand(3, 2), torch.rand(1))
    wanted = module_of(*with_sizes())(*inputs)
    graph, modules = with_sizes()
    assert add_side_stream(graph, modules, "sample", CPU) == 4
    module = module_of(graph, modules)
    assert torch.equal(module(*inputs), wanted)
    names = [n.name for n in module.graph.nodes if n.op != "placeholder"]
    assert names[:2] == ["sym_size_int", "side_fork"]
    assert names[-6:] == ["side_back", "first", "reshape_default", "side_wait_0", "second", "output"]


# ---- what is asked of CUDA -----------------------------------------------------------------------------------------


class Cuda:
    """Stands in for `torch.cuda`: streams and events that write down what is asked of them."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.current: Any = "main"
        self.events = 0

    def stream(self, device: torch.device) -> Any:
        return Stream(self)

    def event(self) -> Any:
        self.events += 1
        return Event(self, self.events - 1)

    def set_stream(self, stream: Any) -> None:
        self.current = stream
        self.said.append(f"work goes to {stream}")


class Stream:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def __str__(self) -> str:
        return "side"

    def wait_stream(self, other: Any) -> None:
        self.cuda.said.append(f"{self} waits for {other}")


class Event:
    def __init__(self, cuda: Cuda, number: int) -> None:
        self.cuda, self.number = cuda, number

    def record(self, stream: Any) -> None:
        self.cuda.said.append(f"event {self.number} on {stream}")

    def wait(self, stream: Any) -> None:
        self.cuda.said.append(f"{stream} waits for event {self.number}")


def test_what_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork, two groups with an event each, back, and the main stream waits for one event after the other."""
    cuda = Cuda()
    monkeypatch.setattr(side_stream.torch.cuda, "Stream", cuda.stream)
    monkeypatch.setattr(side_stream.torch.cuda, "Event", cuda.event)
    monkeypatch.setattr(side_stream.torch.cuda, "current_stream", lambda: cuda.current)
    monkeypatch.setattr(side_stream.torch.cuda, "set_stream", cuda.set_stream)
    # The inputs, two kernels of the timestep, two of the condition, then the image reads one after the other.
    graph, modules = made_up(["sample", "timestep", "condition"], [[1], [3], [2], [5], [0], [7, 4], [8, 6]])
    for name in modules:
        modules[name].register_forward_hook(
            lambda *_, name=name: cuda.said.append(f"{name} on {'main' if cuda.current == 'main' else 'side'}")
        )
    assert add_side_stream(graph, modules, "sample", torch.device("cuda")) == 4
    assert cuda.said == []
    module = module_of(graph, modules)
    wanted = [
        "side waits for main",
        "work goes to side",
        "k0 on side",
        "k1 on side",
        "event 0 on side",
        "k2 on side",
        "k3 on side",
        "event 1 on side",
        "work goes to main",
        "k4 on main",
        "main waits for event 0",
        "k5 on main",
        "main waits for event 1",
        "k6 on main",
        "last on main",
    ]
    for _ in range(2):  # every call anew
        cuda.said.clear()
        module(*(torch.tensor(float(i + 1)) for i in range(3)))
        assert cuda.said == wanted


def test_the_output_waits_for_what_nobody_reads_on_the_main_stream() -> None:
    """A capture ends with everything joined."""
    # Kernels 0 to 3 hang on the timestep; the output is a tuple of them and of the image's.
    graph = fx.Graph()
    sample, timestep = graph.placeholder("sample"), graph.placeholder("timestep")
    vector = timestep
    for i in range(4):
        vector = graph.call_module(f"k{i}", (vector,))
    graph.output((graph.call_module("k4", (sample,)), vector))
    modules: dict[str, nn.Module] = {f"k{i}": Add() for i in range(5)}
    assert add_side_stream(graph, modules, "sample", CPU) == 4
    names = [n.name for n in graph.nodes]
    assert names[-4:] == ["side_back", "k4", "side_wait_0", "output"]
