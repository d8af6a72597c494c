"""Twenty clients at once for some seconds: images or "429, later", and every image is what its request draws alone.

`scripts/serve_load.py` does the same with a real model, for longer.
"""

import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from fake_backend import FakeBackend
from test_serving_hostile import wait_for

GENERATIONS = "/v1/images/generations"
CLIENTS, SECONDS = 20, 4


class Slow(FakeBackend):
    """A call of the denoiser takes long enough for others to come meanwhile."""

    def denoise(self, calls: Sequence[Any], at_once: int = 1) -> list[Any]:
        time.sleep(0.001)
        return super().denoise(calls, at_once)


def wanted(rng: random.Random) -> dict[str, Any]:
    """A request that differs from others in everything that may share a call; half of them are streams."""
    stream = rng.random() < 0.5
    return {
        "class_label": rng.randrange(10),
        "seed": rng.randrange(2**31),
        "num_inference_steps": rng.randint(2, 8),
        "guidance_scale": rng.choice([1.0, 1.5, 3.0]),
        "scheduler": rng.choice([None, "ddim", "euler"]),
        "output_format": rng.choice(["png", "webp"]),
        **({"stream": True, "partial_images": rng.randrange(4)} if stream else {"n": rng.choice([1, 1, 2, 5])}),
    }


def images(answer: httpx.Response) -> tuple[str, ...]:
    """Of an answer, or the last of a stream's events."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        event = json.loads(answer.text.strip().rpartition("data: ")[2])
        return (event["b64_json"],)
    return tuple(image["b64_json"] for image in answer.json()["data"])


def ask(url: httpx.URL, requests: Sequence[dict[str, Any]], seed: int) -> tuple[Counter[int], dict[int, set[Any]]]:
    """One client: requests one after the other; one in ten it leaves before its answer is there."""
    rng, seen, drawn = random.Random(seed), Counter[int](), defaultdict[int, set[Any]](set)
    until = time.monotonic() + SECONDS
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        while time.monotonic() < until:
            number = rng.randrange(len(requests))
            if rng.random() < 0.1:
                with client.stream("POST", GENERATIONS, json={**requests[number], "n": 1, "stream": True}):
                    continue
            answer = client.post(GENERATIONS, json=requests[number])
            seen[answer.status_code] += 1
            if answer.status_code == 200:
                drawn[number].add(images(answer))
            else:
                assert int(answer.headers["retry-after"]) >= 1
                time.sleep(rng.uniform(0, 0.05))
    return seen, drawn


def test_twenty_clients_get_their_own_images(start: Any, caplog: Any) -> None:
    client = start(backend=Slow(), policy="adaptive", max_batch=4, max_queue=6)
    requests = [wanted(random.Random(seed)) for seed in range(16)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(lambda seed: ask(client.base_url, requests, seed), range(CLIENTS)))
    seen = sum((statuses for statuses, _ in found), Counter[int]())
    assert set(seen) == {200, 429}
    assert seen[200] > CLIENTS
    drawn = {number for _, images_of in found for number in images_of}
    for number in drawn:
        alone = images(client.post(GENERATIONS, json=requests[number]))
        assert all(images_of.get(number, {alone}) == {alone} for _, images_of in found)
    assert len(drawn) > len(requests) / 2
    wait_for(lambda: client.engine.running == client.engine.waiting == 0)
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]
