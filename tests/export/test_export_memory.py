"""What is said where a model's memory runs out in ONNX Runtime: in a process that may take little more than it has."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from hqc.errors import is_memory_error

pytest.importorskip("resource")

PROGRAM = textwrap.dedent(
    """
    import resource, sys
    from pathlib import Path
    import numpy as np
    from hqc.errors import HqcError
    from hqc.export.ort_session import import_onnxruntime, open_session, run_session

    import_onnxruntime()
    model, rows = Path(sys.argv[1]), int(sys.argv[2])
    session = open_session(model, threads=1) if rows else None
    x = np.zeros((rows, 2), np.float32)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 50_000_000, held + 50_000_000))
    try:
        run_session(session, ["y"], {"x": x}) if rows else open_session(model, threads=1)
    except HqcError as error:
        print(type(error).__name__, error.line)
    """
)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads what the process holds in /proc")
@pytest.mark.parametrize(
    ("width", "rows", "said"), [(10_000_000, 0, "opened it, 80.0 MB in files; "), (1000, 10**6, "in a call (")]
)
def test_a_model_that_memory_is_too_short_for(tmp_path: Path, width: int, rows: int, said: str) -> None:
    weight = numpy_helper.from_array(np.zeros((2, width), np.float32), "w")
    values = [helper.make_tensor_value_info(name, 1, ["N", size]) for name, size in (("x", 2), ("y", width))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    del weight, graph
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "m.onnx"), str(rows)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.startswith("MemoryShortError "), found
    assert said in found
    assert "Export it again" not in found
    assert ("take a machine with more memory" if rows == 0 else "Run fewer samples at once.") in found


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (RuntimeError("Load model from m.onnx failed:std::bad_alloc"), True),
        (RuntimeError("Failed to allocate memory for requested buffer of size 400000000"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("indices element out of data bounds"), False),
    ],
)
def test_words_for_memory_that_has_run_out(error: Exception, short: bool) -> None:
    assert is_memory_error(error) == short
