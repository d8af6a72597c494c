"""Ray Serve on this machine: two replicas, one killed under load; every request is answered. Needs hqc[ray]."""

import collections
import os
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

import hqc
from hqc.errors import OptionError

pytest.importorskip("ray", reason="ray is not installed: pip install 'hqc[ray]'")

# Ray's own: grpc's asynchronous channels, and sockets that its processes leave open.
pytestmark = [pytest.mark.filterwarnings("ignore::ResourceWarning"), pytest.mark.filterwarnings("ignore::Warning")]
PORT = 18_765


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray") / "onnx"
    few = {"calibrate_activations.samples": 2, "sampler.num_inference_steps": 2}
    hqc.export_program(hqc.ptq(hqc.trace("digits"), "rtn", "w4a4", settings=few), "onnxruntime", folder)
    return folder


def test_a_killed_replica_loses_no_request_silently(export: Path) -> None:
    import psutil

    from hqc.integrations.ray import application, started
    from hqc.serving.limits import Limits

    app = application(str(export), replicas=(2, 2), limits=Limits(max_batch=4))
    with started(app, "127.0.0.1", PORT), httpx.Client(base_url=f"http://127.0.0.1:{PORT}", trust_env=False) as client:
        assert client.get("/health", timeout=60).json()["status"] == "ok"
        seen: collections.Counter[int] = collections.Counter()
        images: dict[tuple[int, int], set[str]] = collections.defaultdict(set)

        def ask(label: int) -> None:
            for seed in range(6):
                body = {"class_label": label, "seed": seed, "num_inference_steps": 8}
                answer = client.post("/v1/images/generations", json=body, timeout=120)
                seen[answer.status_code] += 1
                if answer.status_code == 200:
                    images[label, seed].add(answer.json()["data"][0]["b64_json"])

        asking = [threading.Thread(target=ask, args=(label,)) for label in range(6)]
        for thread in asking:
            thread.start()
        time.sleep(0.5)
        replicas = [p.pid for p in psutil.process_iter(["cmdline"]) if "ServeReplica" in " ".join(p.cmdline())]
        assert len(replicas) == 2
        os.kill(replicas[0], 9)
        for thread in asking:
            thread.join(120)
        assert sum(seen.values()) == 36  # every one has an answer
        assert set(seen) <= {200, 500, 503}  # those of the killed replica are told so
        assert seen[200] >= 20
        body = {"class_label": 1, "seed": 0, "num_inference_steps": 8}
        again = client.post("/v1/images/generations", json=body, timeout=120)
        assert images[1, 0] <= {again.json()["data"][0]["b64_json"]}  # whichever replica drew it


@pytest.mark.parametrize("replicas", [(0, 1), (3, 2)])
def test_replicas_that_make_no_sense(replicas: Any, export: Path) -> None:
    from hqc.integrations.ray import application

    with pytest.raises(OptionError, match="replicas"):
        application(str(export), replicas=replicas)
