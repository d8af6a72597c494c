"""The API as the official client calls it: fields, formats, streams, errors by class, retries."""

import base64
import inspect
import io
import json
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from fake_backend import SIZE, FakeBackend
from PIL import Image

from hqc.errors import EvaluationError
from hqc.serving.errors import ApiError
from hqc.serving.limits import Limits
from hqc.serving.requests import GenerationRequest, request_from_body

KEY = "no-key-is-asked-for"


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def server(backend: FakeBackend, start: Any) -> Iterator[httpx.Client]:
    yield start(backend=backend, max_images=4, max_steps=50, max_batch=2, max_queue=1)
    if backend.gate is not None:
        backend.gate.set()


@pytest.fixture
def client(server: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=KEY, max_retries=0, timeout=30) as made:
        yield made


def opened(b64_json: str | None) -> Image.Image:
    assert b64_json is not None
    return Image.open(io.BytesIO(base64.b64decode(b64_json, validate=True)))


def pixels_of(b64_json: str | None) -> Any:
    return np.asarray(opened(b64_json))


def test_an_image(client: openai.OpenAI) -> None:
    before = int(time.time())
    answer = client.images.generate(prompt="a handwritten 7", model="any", size="auto", n=2, extra_body={"seed": 5})
    assert before <= answer.created <= time.time()
    assert answer.data is not None
    assert [image.revised_prompt for image in answer.data] == ["a handwritten 7"] * 2
    assert (answer.output_format, answer.background, answer.size) == ("png", "opaque", f"{SIZE}x{SIZE}")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens_details.text_tokens == 0
    first, second = (pixels_of(image.b64_json) for image in answer.data)
    assert first.shape == (SIZE, SIZE)
    assert (first != second).any()
    again = client.images.generate(prompt="7", extra_body={"seed": 6})
    assert again.data is not None
    np.testing.assert_array_equal(pixels_of(again.data[0].b64_json), second)


def test_every_extra_field_changes_the_image(client: openai.OpenAI) -> None:
    plain = {"class_label": 3, "seed": 1, "num_inference_steps": 4, "guidance_scale": 2.0}
    changed = [
        {}, {"class_label": 4}, {"seed": 2}, {"num_inference_steps": 3}, {"guidance_scale": 3.0},
        {"scheduler": "euler"}, {"loras": {"ink": 3.5}}, {"loras": {"ink": 3.5, "oil": 4}},
    ]  # fmt: skip
    images = []
    for change in changed:
        answer = client.images.generate(prompt="", extra_body={**plain, **change})
        assert answer.data is not None
        images.append(answer.data[0].b64_json)
    assert len(set(images)) == len(images)


@pytest.mark.parametrize(("output_format", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(client: openai.OpenAI, output_format: Any, kind: str) -> None:
    answer = client.images.generate(prompt="8", output_format=output_format, extra_body={"seed": 3})
    assert answer.data is not None
    assert opened(answer.data[0].b64_json).format == kind
    assert answer.output_format == output_format
    if output_format == "png":
        return
    sizes = []
    for quality in (0, 5, 100):
        small = client.images.generate(
            prompt="8", output_format=output_format, output_compression=quality, extra_body={"seed": 3}
        )
        assert small.data is not None
        sizes.append(len(small.data[0].b64_json or ""))
    assert sizes[0] <= sizes[1] < sizes[2]


def test_webp_at_a_hundred_loses_nothing(client: openai.OpenAI) -> None:
    answers = [
        client.images.generate(prompt="8", output_format=kind, extra_body={"seed": 3})  # type: ignore[arg-type]
        for kind in ("png", "webp")
    ]
    png, webp = (pixels_of(answer.data[0].b64_json) for answer in answers if answer.data)
    np.testing.assert_array_equal(webp[..., 0], png)


def test_values_that_change_nothing_are_taken(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="8", background="opaque", quality="auto", style="natural", moderation="low", user="me",
        response_format="b64_json", partial_images=0, stream=False, output_compression=100,
        extra_body={"safety_identifier": "x", "seed": 1},
    )  # fmt: skip
    plain = client.images.generate(prompt="8", extra_body={"seed": 1})
    assert answer.data is not None
    assert plain.data is not None
    assert answer.data[0].b64_json == plain.data[0].b64_json


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"response_format": "url"}, "response_format", 'only "b64_json"'),
        ({"background": "transparent"}, "background", "draws no transparency"),
        ({"quality": "high"}, "quality", "num_inference_steps decides"),
        ({"output_format": "gif"}, "output_format", "only png, jpeg or webp"),
        ({"output_format": "svg"}, "output_format", "only png, jpeg or webp"),
        ({"output_compression": 50}, "output_compression", "of jpeg and webp alone"),
        ({"output_compression": 101, "output_format": "jpeg"}, "output_compression", "100"),
        ({"partial_images": 2}, "partial_images", "only of a stream"),
        ({"partial_images": 4, "stream": True}, "partial_images", "3"),
        ({"stream": True, "n": 2}, "n", "a stream has one"),
        ({"size": "1024x1024"}, "size", f"{SIZE}x{SIZE}"),
        ({"scheduler": "dpm"}, "scheduler", "takes ddim, euler"),
        ({"scheduler": "euler", "num_inference_steps": 1}, "num_inference_steps", "too few"),
        ({"frame_count": 4}, "frame_count", "animations"),
        ({"svg": {}}, "svg", "draws no svg"),
        ({"lora": "x"}, "lora", "unknown field"),
        ({"loras": {"chalk": 1.0}}, "loras", "this model has ink, oil"),
        ({"loras": {"ink": "1"}}, "loras", "number"),
        ({"loras": {"ink": 11}}, "loras", "10"),
        ({"prompt": "cat"}, "prompt", "exactly one digit"),
    ],
)  # fmt: skip
def test_what_would_change_the_picture_is_refused(
    client: openai.OpenAI, backend: FakeBackend, fields: dict[str, Any], param: str, text: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="8", extra_body=fields)
    assert refused.value.param == param
    assert text in refused.value.message
    assert refused.value.type == "invalid_request_error"
    assert refused.value.code == ("unknown_parameter" if param in ("lora", "frame_count", "svg") else "invalid_value")
    assert refused.value.request_id is not None
    assert backend.begun == []


def test_every_field_of_the_client_is_known_or_refused_for_a_reason() -> None:
    """A newer client may have more: each belongs into the schema, or among what is refused in words of its own."""
    ways = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}  # how it asks, not what for
    fields = set(inspect.signature(openai.resources.images.Images.generate).parameters) - ways
    assert len(fields) > 15
    for name in fields - set(GenerationRequest.model_fields):
        with pytest.raises(ApiError) as refused:
            request_from_body(json.dumps({"prompt": "1", name: 1}).encode())
        assert refused.value.param == name
        assert "unknown field" not in refused.value.message, f"{name}: say in hqc.serving.requests what becomes of it"


def test_a_stream(client: openai.OpenAI) -> None:
    asked = {"class_label": 2, "seed": 9, "num_inference_steps": 8}
    with client.images.generate(prompt="", stream=True, partial_images=3, extra_body=asked) as stream:
        *partial, last = list(stream)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 3
    assert [event.partial_image_index for event in partial] == [0, 1, 2]  # type: ignore[union-attr]
    assert last.type == "image_generation.completed"
    assert last.usage.total_tokens == 0
    assert last.output_format == "png"
    assert (last.size, last.quality, last.background) == (f"{SIZE}x{SIZE}", "auto", "opaque")
    plain = client.images.generate(prompt="2", extra_body={"seed": 9, "num_inference_steps": 8})
    assert plain.data is not None
    assert last.b64_json == plain.data[0].b64_json  # previews do not change the image
    images = [pixels_of(event.b64_json).astype(int) for event in (*partial, last)]
    assert all((a != b).any() for a, b in pairwise(images))


def test_a_stream_of_few_steps_has_fewer_previews(client: openai.OpenAI) -> None:
    with client.images.generate(
        prompt="2", stream=True, partial_images=3, extra_body={"num_inference_steps": 2}
    ) as stream:
        assert [event.type.split(".")[1] for event in stream] == ["partial_image", "completed"]


def test_events_have_no_ids(server: httpx.Client) -> None:
    body = {"prompt": "1", "stream": True, "partial_images": 1, "output_format": "jpeg"}
    with server.stream("POST", "/v1/images/generations", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert [line.split(":")[0] for line in lines] == ["event", "data", "event", "data"]
    for line in lines[1::2]:
        event = json.loads(line.removeprefix("data: "))
        assert opened(event["b64_json"]).format == "JPEG"


def test_a_model_that_fails_is_not_asked_again(backend: FakeBackend, server: httpx.Client) -> None:
    backend.failure = EvaluationError("sample", "all images are not finite", "Train again")
    patient = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=KEY, max_retries=2, timeout=30)
    with pytest.raises(openai.InternalServerError, match="not finite") as failed:
        patient.images.generate(prompt="1")
    assert failed.value.code == "generation_failed"
    assert len(backend.batches) == 1
    with (
        pytest.raises(openai.APIError, match="not finite"),
        patient.images.generate(prompt="1", stream=True) as stream,
    ):
        list(stream)
    backend.failure = None
    assert patient.images.generate(prompt="1").data


def test_a_full_line_is_tried_again_when_it_says(backend: FakeBackend, server: httpx.Client) -> None:
    backend.gate = threading.Event()
    url = f"{server.base_url}/v1"
    asking = [
        threading.Thread(
            target=lambda: openai.OpenAI(base_url=url, api_key=KEY, timeout=30).images.generate(prompt="1", n=2)
        )
        for _ in range(2)
    ]
    asking[0].start()
    assert backend.entered.acquire(timeout=30)
    asking[1].start()
    deadline = time.monotonic() + 30
    while server.engine.waiting < 1:  # type: ignore[attr-defined]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    with pytest.raises(openai.RateLimitError) as refused:
        openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=30).images.generate(prompt="1")
    assert int(refused.value.response.headers["retry-after"]) >= 1
    threading.Timer(0.2, backend.gate.set).start()
    assert openai.OpenAI(base_url=url, api_key=KEY, max_retries=2, timeout=30).images.generate(prompt="1").data
    for thread in asking:
        thread.join(30)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["digits-test"]
    model = client.models.retrieve("digits-test")
    assert (model.object, model.owned_by) == ("model", "hqc")
    with pytest.raises(openai.NotFoundError, match="there is digits-test"):
        client.models.retrieve("gpt-image-1")


def test_two_models_are_chosen_by_name(start: Any) -> None:
    first, second = FakeBackend(), FakeBackend()
    server = start(backend=first, beside=second)
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=KEY, max_retries=0, timeout=30)
    assert [model.id for model in client.models.list()] == ["digits-test", "beside"]
    for name, backend in (("beside", second), ("digits-test", first), ("dall-e-3", first)):
        before = len(backend.begun)
        assert client.images.generate(prompt="1", model=name).data
        assert len(backend.begun) == before + 1


def test_request_ids(server: httpx.Client) -> None:
    ids = [server.get("/health").headers["x-request-id"] for _ in range(2)]
    assert len(set(ids)) == 2
    assert server.get("/nothing", headers={"x-request-id": "mine-1.a_b"}).headers["x-request-id"] == "mine-1.a_b"
    assert server.get("/health", headers={"x-request-id": "x" * 200}).headers["x-request-id"] != "x" * 200


def test_metrics(server: httpx.Client, client: openai.OpenAI) -> None:
    client.images.generate(prompt="1", n=2, extra_body={"num_inference_steps": 3})
    with client.images.generate(prompt="1", stream=True, partial_images=1) as stream:
        list(stream)
    text = server.get("/metrics").text
    model = 'model="digits-test"'
    for line in (
        f'hqc_requests_total{{{model},status="ok"}} 2.0',
        f"hqc_images_total{{{model}}} 3.0",
        f"hqc_requests_running{{{model}}} 0.0",
        f"hqc_requests_waiting{{{model}}} 0.0",
        f"hqc_batch_limit{{{model}}} 2.0",
        f'hqc_step_batch_size_bucket{{le="1.0",{model}}} 20.0',
        f"hqc_step_batch_size_count{{{model}}} 23.0",
        f"hqc_request_latency_seconds_count{{{model}}} 2.0",
        f"hqc_queue_time_seconds_count{{{model}}} 2.0",
        f"hqc_step_latency_seconds_count{{{model}}} 23.0",
        f"hqc_time_to_first_partial_seconds_count{{{model}}} 1.0",
    ):
        assert line in text.splitlines(), line
    for name in ("hqc_step_fixed_seconds", "hqc_step_row_seconds"):
        assert f"\n{name}{{{model}}} " in text


def test_limits_of_the_defaults() -> None:
    limits = Limits()
    assert (limits.max_batch, limits.max_queue, limits.request_s) == (8, 64, 600)
