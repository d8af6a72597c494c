"""The builder's side of a build, the same for both builders: parse, profile, compile, describe.

Runs in a process of its own: a graph that the builder does not expect can take the process down. Nothing but the
builder's own module is imported, so that the peak of resident memory is the builder's.
"""

import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqc.engines.requests import Answer, BuildRequest
from hqc.memory import peak_resident_bytes

__all__ = ["BuildLog", "BuildProblem", "Hooks", "compile_network", "main"]


class BuildProblem(Exception):
    """What the builder refuses, and at which step."""

    def __init__(self, step: str, problem: str, node: str = "") -> None:
        super().__init__(problem)
        self.step, self.problem, self.node = step, problem, node


class BuildLog:
    """Every line of the builder in a file, flushed as it is said; the errors and the layer list are kept."""

    def __init__(self, trt: Any, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self.errors: list[str] = []
        self.layers = ""
        says = self.say

        class Logger(trt.ILogger):  # type: ignore[misc]  # a class of the module that is asked for
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                says(severity.name, message)

        self.logger = Logger()

    def say(self, severity: str, message: str) -> None:
        """One message of the builder."""
        self._file.write(f"{severity} {message}\n")
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message)
        if message.startswith("Layers:"):
            self.layers = message


@dataclass(frozen=True)
class Hooks:
    """What differs between the builders. Each takes the builder's module first.

    prepare(trt, request): before parsing.
    configure(trt, config, request): before building.
    describe(trt, config, plan, log, request): after building; gives the engine's layers as text.
    """

    module: str
    prepare: Callable[[Any, BuildRequest], None]
    configure: Callable[[Any, Any, BuildRequest], None]
    describe: Callable[[Any, Any, Any, BuildLog, BuildRequest], str]


def main(hooks: Hooks) -> None:
    """Carries out the request in the file that the first argument names; the answer goes to the second."""
    request, answer = BuildRequest.read(Path(sys.argv[1])), Path(sys.argv[2])
    try:
        trt = importlib.import_module(hooks.module)
    except (ImportError, OSError) as error:
        Answer(step="import", problem=f"{hooks.module} cannot be imported ({error})").write(answer)
        return
    log = BuildLog(trt, Path(request.log))
    try:
        result = compile_network(trt, log, request, hooks)
    except BuildProblem as found:
        result = Answer(found.problem, found.step, found.node, builder_version=trt.__version__)
    result.write(answer)


def compile_network(trt: Any, log: BuildLog, request: BuildRequest, hooks: Hooks) -> Answer:
    """ONNX -> serialised engine, strongly typed, with detailed profiling.

    Raises:
        BuildProblem: if the builder refuses the model or a setting.
    """
    start = time.perf_counter()
    hooks.prepare(trt, request)
    builder = trt.Builder(log.logger)
    # TensorRT 10 needs the flag, in 11 and in RTX it is the only kind of network.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(request.onnx):
        raise _parser_problem(parser)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not request.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    hooks.configure(trt, config, request)
    _add_profile(builder, config, request)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildProblem("build", _one_line(log.errors) or "no engine came out, and no reason was given")
    Path(request.plan).write_bytes(plan)
    return Answer(
        layers=hooks.describe(trt, config, plan, log, request),
        builder_version=trt.__version__,
        seconds=round(time.perf_counter() - start, 3),
        peak_resident_bytes=peak_resident_bytes(),
        dtypes=_dtypes(network),
    )


def _parser_problem(parser: Any) -> BuildProblem:
    """The first error, which the others follow from, with its node."""
    if not parser.num_errors:
        return BuildProblem("parse", "it cannot be parsed, and no reason was given")
    error = parser.get_error(0)
    node = " ".join(part for part in (error.node_name(), f"({error.node_operator()})") if part.strip("()"))
    said = [error.code().name, error.func(), "" if error.desc() == "false" else error.desc()]
    return BuildProblem("parse", _one_line([": ".join(filter(None, said))]), node)


def _one_line(messages: list[str]) -> str:
    """The first message in one line of bearable length."""
    return " ".join(messages[0].split())[:400] if messages else ""


def _add_profile(builder: Any, config: Any, request: BuildRequest) -> None:
    if not request.shapes:
        return
    profile = builder.create_optimization_profile()
    for name, (low, usual, high) in request.shapes.items():
        profile.set_shape(name, tuple(low), tuple(usual), tuple(high))
    if config.add_optimization_profile(profile) < 0:
        raise BuildProblem("profile", f"the profile {dict(request.shapes)} is refused")


def _dtypes(network: Any) -> dict[str, str]:
    values = [network.get_input(i) for i in range(network.num_inputs)]
    values += [network.get_output(i) for i in range(network.num_outputs)]
    return {value.name: value.dtype.name.lower() for value in values}
