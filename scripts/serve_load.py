"""Many clients at once against `hqc serve`: what they are answered, the server's memory, and every image's bits.

    python scripts/serve_load.py trained-onnx --clients 200 --seconds 60

Every client sends one request after the other, each one of a few that differ in class, seed, steps, guidance and
scheduler; after 429 it waits as told. Then the server draws each of those alone, and every image must be equal.
"""

import argparse
import asyncio
import collections
import random
import subprocess
import sys
import time
from typing import Any

import httpx
import psutil

GENERATIONS = "/v1/images/generations"


def wanted(count: int, schedulers: list[str]) -> list[dict[str, Any]]:
    """Requests that differ in everything that may share a call."""
    rng = random.Random(0)
    return [
        {
            "class_label": rng.randrange(10),
            "seed": rng.randrange(2**31),
            "num_inference_steps": rng.randint(4, 12),
            "guidance_scale": rng.choice([1.0, 1.5, 3.0]),
            "scheduler": rng.choice([None, *schedulers]),
        }
        for _ in range(count)
    ]


async def ask(client: httpx.AsyncClient, requests: list[dict[str, Any]], until: float, seen: Any, images: Any) -> None:
    """One client: requests until the time is up."""
    rng = random.Random(id(client) ^ id(asyncio.current_task()))
    while time.monotonic() < until:
        number = rng.randrange(len(requests))
        try:
            answer = await client.post(GENERATIONS, json=requests[number], timeout=120)
        except httpx.HTTPError as error:
            seen[type(error).__name__] += 1
            continue
        seen[answer.status_code] += 1
        if answer.status_code == 200:
            images[number].add(answer.json()["data"][0]["b64_json"])
        elif answer.status_code == 429:
            await asyncio.sleep(float(answer.headers["retry-after"]) * rng.uniform(0.2, 1))


async def watch(process: psutil.Process, until: float, memory: list[float]) -> None:
    """The server's resident memory, MB, every second."""
    while time.monotonic() < until:
        memory.append(process.memory_info().rss / 1e6)
        await asyncio.sleep(1)


async def load(url: str, process: psutil.Process, clients: int, seconds: float, different: int) -> int:
    """All of it; the exit status."""
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, trust_env=False, limits=limits) as client:
        takes = (await client.get("/health")).json()["takes"]
        requests = wanted(different, takes["schedulers"])
        seen: collections.Counter[Any] = collections.Counter()
        images: list[set[str]] = [set() for _ in requests]
        memory: list[float] = []
        until = time.monotonic() + seconds
        asking = (ask(client, requests, until, seen, images) for _ in range(clients))
        await asyncio.gather(watch(process, until, memory), *asking)
        alone = [(await client.post(GENERATIONS, json=request, timeout=120)).json() for request in requests]
    other = sum(found != {one["data"][0]["b64_json"]} for found, one in zip(images, alone, strict=True) if found)
    third = max(1, len(memory) // 3)
    print(
        f"{clients} clients for {seconds:g} s: "
        + ", ".join(f"{n} × {status}" for status, n in sorted(seen.items(), key=str))
    )
    print(f"images/s: {seen[200] / seconds:.2f}; different requests: {sum(map(bool, images))} of {different} answered")
    print(f"requests whose image differs from drawing it alone: {other}")
    print(f"resident MB: {max(memory[:third]):.0f} in the first third, {max(memory[-third:]):.0f} in the last")
    return 0 if other == 0 and set(seen) <= {200, 429} else 1


def main() -> int:
    """Starts the server, asks, and tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--different", type=int, default=40)
    given = parser.parse_args()
    command = [sys.executable, "-m", "hqc.cli", "serve", given.model, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[2]
            return asyncio.run(load(url, psutil.Process(process.pid), given.clients, given.seconds, given.different))
        finally:
            process.terminate()


if __name__ == "__main__":
    sys.exit(main())
