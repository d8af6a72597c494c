"""The API over real HTTP: shapes of answers and refusals, determinism, the queue, a responsive event loop."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from diffusers import DDIMScheduler
from PIL import Image

from hqc.errors import EvaluationError

GENERATIONS = "/v1/images/generations"


def generate(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post(GENERATIONS, json=body)


def assert_refused(response: httpx.Response, status: int, param: str | None, text: str = "") -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert text in error["message"]
    assert error["type"] == {429: "rate_limit_error", 500: "server_error"}.get(status, "invalid_request_error")


def test_answer_has_the_shape_of_the_images_api(client: httpx.Client, pipe: Any) -> None:
    before = int(time.time())
    response = generate(client, prompt="a handwritten 7", n=3, seed=40)
    assert response.status_code == 200
    answer = response.json()
    assert set(answer) == {
        "background", "created", "data", "metrics", "model", "output_format", "quality", "size", "usage"
    }  # fmt: skip
    assert before <= answer["created"] <= time.time()
    assert answer["model"] == "digits-test"
    assert answer["metrics"]["seconds"] > 0
    assert answer["usage"]["total_tokens"] == answer["usage"]["input_tokens"] == 0
    assert [image["seed"] for image in answer["data"]] == [40, 41, 42]
    for image in answer["data"]:
        assert set(image) == {"b64_json", "revised_prompt", "seed"}
        assert image["revised_prompt"] == "a handwritten 7"
        with Image.open(io.BytesIO(base64.b64decode(image["b64_json"], validate=True))) as png:
            assert (png.format, png.size, png.mode) == ("PNG", (32, 32), "L")
            assert len(set(png.tobytes())) > 10  # something is drawn
    assert len({image["b64_json"] for image in answer["data"]}) == 3


def test_options_reach_the_pipeline(client: httpx.Client, pipe: Any) -> None:
    options = {"num_inference_steps": 7, "guidance_scale": 3, "eta": 0.25}
    assert generate(client, class_label=4, n=2, **options).status_code == 200
    assert generate(client, class_label=4).status_code == 200
    array = {"output_type": "np", "return_dict": False}
    assert pipe.calls == [
        {"class_labels": [4], **options, **array},
        {"class_labels": [4], **options, **array},
        {"class_labels": [4], "num_inference_steps": 20, "guidance_scale": 1.5, "eta": 0.0, **array},
    ]


def test_equal_seeds_give_equal_images_and_image_i_is_seed_plus_i(client: httpx.Client) -> None:
    first = generate(client, prompt="3", seed=5, n=2).json()["data"]
    assert generate(client, class_label=3, seed=5, n=2).json()["data"] == first
    assert generate(client, prompt="three", seed=6).json()["data"] == first[1:]
    assert generate(client, prompt="3", seed=7).json()["data"][0]["b64_json"] != first[0]["b64_json"]


def test_random_seed_is_returned_and_draws_the_image_again(client: httpx.Client) -> None:
    one, two = (generate(client, prompt="8", n=2).json()["data"] for _ in range(2))
    assert one[0]["seed"] != two[0]["seed"]
    assert one[1]["seed"] == one[0]["seed"] + 1
    assert generate(client, prompt="8", n=2, seed=one[0]["seed"]).json()["data"] == one


def test_fields_that_openai_clients_send(client: httpx.Client) -> None:
    sent = {"model": "gpt-image-1", "size": "32x32", "user": "me", "response_format": "b64_json", "n": 1}
    response = generate(client, prompt="0", **sent)
    assert response.status_code == 200
    assert response.json()["model"] == "digits-test"
    assert generate(client, prompt="0", size="auto").status_code == 200


def test_null_is_the_same_as_absent(client: httpx.Client) -> None:
    nothing = dict.fromkeys(["class_label", "n", "seed", "eta", "size", "model", "user", "response_format"])
    assert generate(client, prompt="0", **nothing).status_code == 200


@pytest.mark.parametrize("edge", [{"n": 4}, {"num_inference_steps": 50}, {"guidance_scale": 20}, {"eta": 1}])
def test_limits_themselves_are_allowed(client: httpx.Client, edge: dict[str, Any]) -> None:
    assert generate(client, prompt="1", **edge).status_code == 200


def test_largest_seed(client: httpx.Client) -> None:
    top = 2**63 - 1
    assert generate(client, prompt="1", seed=top).json()["data"][0]["seed"] == top
    assert_refused(generate(client, prompt="1", seed=top, n=2), 400, "seed", "2**63-1")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"prompt": "1", "n": 0}', "n"),
        ('{"prompt": "1", "n": 5}', "n"),
        ('{"prompt": "1", "n": -1}', "n"),
        ('{"prompt": "1", "n": true}', "n"),
        ('{"prompt": "1", "n": 1.5}', "n"),
        ('{"prompt": "1", "n": "2"}', "n"),
        ('{"prompt": "1", "n": 1e400}', "n"),
        ('{"prompt": "1", "n": 100000000000000000000000000000000}', "n"),
        ('{"prompt": "1", "seed": -1}', "seed"),
        ('{"prompt": "1", "seed": 9223372036854775808}', "seed"),
        ('{"prompt": "1", "seed": 1.0}', "seed"),
        ('{"prompt": "1", "seed": false}', "seed"),
        ('{"prompt": "1", "seed": NaN}', "seed"),
        ('{"prompt": "1", "num_inference_steps": 0}', "num_inference_steps"),
        ('{"prompt": "1", "num_inference_steps": 51}', "num_inference_steps"),
        ('{"prompt": "1", "num_inference_steps": true}', "num_inference_steps"),
        ('{"prompt": "1", "guidance_scale": NaN}', "guidance_scale"),
        ('{"prompt": "1", "guidance_scale": Infinity}', "guidance_scale"),
        ('{"prompt": "1", "guidance_scale": -Infinity}', "guidance_scale"),
        ('{"prompt": "1", "guidance_scale": 1e999}', "guidance_scale"),
        ('{"prompt": "1", "guidance_scale": -0.1}', "guidance_scale"),
        ('{"prompt": "1", "guidance_scale": 20.1}', "guidance_scale"),
        ('{"prompt": "1", "guidance_scale": true}', "guidance_scale"),
        ('{"prompt": "1", "guidance_scale": "1"}', "guidance_scale"),
        ('{"prompt": "1", "eta": 1.01}', "eta"),
        ('{"prompt": "1", "eta": NaN}', "eta"),
        ('{"prompt": "1", "eta": []}', "eta"),
        ('{"prompt": "1", "response_format": "url"}', "response_format"),
        ('{"prompt": "1", "response_format": 1}', "response_format"),
        ('{"prompt": "1", "size": "1024x1024"}', "size"),
        ('{"prompt": "1", "size": "32"}', "size"),
        ('{"prompt": "1", "model": 3}', "model"),
        ('{"prompt": "1", "user": {}}', "user"),
        ('{"prompt": "1", "quality": "hd"}', "quality"),
        ('{"prompt": "1", "class_label": 2}', "class_label"),
        ('{"prompt": "a cat", "class_label": 2}', "class_label"),
        ('{"class_label": 10}', "class_label"),
        ('{"class_label": -1}', "class_label"),
        ('{"class_label": true}', "class_label"),
        ('{"class_label": "7"}', "class_label"),
        ("{}", "prompt"),
        ('{"prompt": null}', "prompt"),
        ('{"prompt": ""}', "prompt"),
        ('{"prompt": 7}', "prompt"),
        ('{"prompt": ["7"]}', "prompt"),
        ('{"prompt": "a cat"}', "prompt"),
        ('{"prompt": "12"}', "prompt"),
        ('{"prompt": "3 or 4"}', "prompt"),
        ('{"prompt": "eighty-seven"}', "prompt"),
        ("[]", None),
        ('"7"', None),
        ("null", None),
        ("7", None),
    ],
)
def test_refusals_name_the_field(client: httpx.Client, pipe: Any, body: str, param: str | None) -> None:
    response = client.post(GENERATIONS, content=body, headers={"Content-Type": "application/json"})
    assert_refused(response, 400, param, param or "JSON object")
    assert pipe.calls == []


def test_prompt_above_its_length_is_refused(client: httpx.Client) -> None:
    assert generate(client, prompt="7" + " " * 31_999).status_code == 200
    assert_refused(generate(client, prompt="7" + " " * 32_000), 400, "prompt", "32000")


def test_unknown_field_lists_the_known_ones_and_is_cut(client: httpx.Client) -> None:
    response = generate(client, prompt="1", **{"x" * 500: 1})
    assert_refused(response, 400, "x" * 64, "unknown field; known are prompt, negative_prompt, class_label, n")
    assert len(response.text) < 800


def test_an_unknown_field_that_is_null_is_unknown(client: httpx.Client) -> None:
    assert_refused(generate(client, prompt="1", **{"": None}), 400, "", "unknown field")


def test_all_violations_are_told_at_once(client: httpx.Client) -> None:
    response = generate(client, prompt="cat", n=99, size="1x1")
    assert_refused(response, 400, "prompt", "n: 99 images")
    assert "size: " in response.json()["error"]["message"]


def test_response_format_says_why(client: httpx.Client) -> None:
    response = generate(client, prompt="1", response_format="url")
    assert_refused(response, 400, "response_format", 'only "b64_json"')


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"prompt=7",
        b'{"prompt": "7"',
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b"[" * 5000,
        b"{'prompt': '7'}",
    ],
    ids=["empty", "open", "form", "cut", "not UTF-8", "half a surrogate pair", "deep", "single quotes"],
)
def test_malformed_json(client: httpx.Client, body: bytes) -> None:
    response = client.post(GENERATIONS, content=body, headers={"Content-Type": "application/json"})
    assert_refused(response, 400, None, "not valid JSON")


def test_body_limit_holds_with_and_without_content_length(start: Callable[..., httpx.Client], pipe: Any) -> None:
    client = start(max_body_bytes=100)
    head, tail = b'{"prompt": "7', b'"}'
    exact = head + b" " * (100 - len(head) - len(tail)) + tail
    headers = {"Content-Type": "application/json"}
    assert client.post(GENERATIONS, content=exact, headers=headers).status_code == 200
    assert_refused(client.post(GENERATIONS, content=exact + b" ", headers=headers), 413, None, "100 bytes")
    chunked = client.post(GENERATIONS, content=iter([exact, b" "]), headers=headers)
    assert "content-length" not in chunked.request.headers
    assert_refused(chunked, 413, None, "100 bytes")
    assert len(pipe.calls) == 1


def test_default_body_limit_holds_the_longest_prompt(client: httpx.Client) -> None:
    """32 000 characters of six bytes each."""
    body = json.dumps({"prompt": "7"}).encode().ljust(192 * 1024)
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert client.post(GENERATIONS, content=body, headers=headers).status_code == 200
    assert_refused(client.post(GENERATIONS, content=body + b" ", headers=headers), 413, None)


@pytest.mark.parametrize("declared", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_declared_json_is_read(client: httpx.Client, declared: str) -> None:
    response = client.post(GENERATIONS, content=b'{"prompt": "7"}', headers={"Content-Type": declared})
    assert_refused(response, 415, None, "Content-Type: application/json")


def test_unknown_route_and_method(client: httpx.Client) -> None:
    assert_refused(client.get("/v1/nothing"), 404, None)
    response = client.get(GENERATIONS)
    assert_refused(response, 405, None)
    assert response.headers["allow"] == "POST"


def test_health_and_models(client: httpx.Client) -> None:
    health = client.get("/health").json()
    assert set(health) == {"status", "model", "runtime", "hqc", "takes", "running", "waiting", "models"}
    assert (health["status"], health["model"], health["runtime"]) == ("ok", "digits-test", "fake")
    models = client.get("/v1/models").json()
    assert models["object"] == "list"
    assert [(card["id"], card["object"]) for card in models["data"]] == [("digits-test", "model")]


def test_openapi_describes_the_request(client: httpx.Client) -> None:
    post = client.get("/openapi.json").json()["paths"][GENERATIONS]["post"]
    properties = post["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"prompt", "class_label", "n", "seed", "eta"} <= set(properties)


def test_steps_are_limited_by_the_scheduler_too(start: Callable[..., httpx.Client], pipe: Any) -> None:
    pipe.scheduler = DDIMScheduler(num_train_timesteps=10)
    client = start(max_steps=50)
    assert_refused(generate(client, prompt="1", num_inference_steps=11), 400, "num_inference_steps", "at most 10")
    assert generate(client, prompt="1").status_code == 200
    assert pipe.calls[0]["num_inference_steps"] == 10  # the default of 20 is above it


def test_health_answers_during_a_generation(client: httpx.Client, pipe: Any) -> None:
    pipe.gate = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(generate, client, prompt="7")
        assert pipe.entered.acquire(timeout=30)
        assert client.get("/health", timeout=5).json()["status"] == "ok"
        assert_refused(generate(client, prompt="cat"), 400, "prompt")  # refusals do not wait either
        assert not pending.done()
        pipe.gate.set()
        assert pending.result(30).status_code == 200


def test_one_at_a_time_then_429_above_the_queue(client: Any, pipe: Any) -> None:
    """max_queue=2: one runs, two wait, the fourth is refused; afterwards there is room again."""
    pipe.gate = threading.Event()
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(generate, client, prompt="1", seed=1)
        assert pipe.entered.acquire(timeout=30)
        waiting = [pool.submit(generate, client, prompt="2", seed=i) for i in range(2)]
        wait_for(lambda: client.engine.waiting == 2)
        refused = generate(client, prompt="9")
        assert_refused(refused, 429, None, "2 requests are waiting")
        assert int(refused.headers["retry-after"]) >= 1
        assert len(pipe.calls) == 1
        pipe.gate.set()
        answers = [future.result(30) for future in (running, *waiting)]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    alone = generate(client, prompt="2", seed=1)
    assert alone.status_code == 200
    assert alone.json()["data"] == answers[2].json()["data"]  # waiting in line changes nothing


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_model_that_fails_gives_500_and_the_next_request_works(client: httpx.Client, pipe: Any) -> None:
    pipe.failure = EvaluationError("sample_images", "all images are not finite", "Train again")
    assert_refused(generate(client, prompt="1"), 500, None, "all images are not finite")
    pipe.failure = RuntimeError("secret detail")
    response = generate(client, prompt="1")
    assert_refused(response, 500, None, "internal error")
    assert "secret" not in response.text
    assert (response.headers["x-should-retry"], "x-request-id" in response.headers) == ("false", True)
    assert response.headers["connection"] == "close"  # uvicorn closes it: the client must not send into it
    pipe.failure = None
    assert generate(client, prompt="1").status_code == 200
