"""What a request may ask for follows from the model that is served: a prompt, a class, or nothing."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from hqc.evaluation.needs import needs_of
from hqc.needs import Kind, Needs
from hqc.serving.jobs import job_of
from hqc.serving.limits import Limits
from hqc.serving.offer import Offer, request_schema
from hqc.serving.requests import request_from_body

GENERATIONS = "/v1/images/generations"


class _Drawing:
    """Images of noise; remembers what it was called with."""

    def __init__(self, scheduler: Any = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.unet = SimpleNamespace(config=SimpleNamespace(sample_size=4, get=lambda name: None))
        self.vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(8, 8), out_channels=3))
        self.scheduler = scheduler or DDIMScheduler(num_train_timesteps=100)

    def _draw(self, generator: list[torch.Generator], **options: Any) -> Any:
        self.calls.append(options)
        return (torch.stack([torch.rand(8, 8, 3, generator=each) for each in generator]).numpy(),)


class _Text(_Drawing):
    def __call__(
        self,
        prompt: list[str],
        negative_prompt: Any = None,
        guidance_scale: float = 7.5,
        *,
        generator: Any,
        **_: Any,
    ) -> Any:
        return self._draw(generator, prompt=prompt, negative_prompt=negative_prompt, guidance_scale=guidance_scale)


class _Classes(_Drawing):
    """Ten classes that are no digits."""

    def __init__(self) -> None:
        super().__init__()
        self.unet.config.get = lambda name: 10 if name == "num_embeds_ada_norm" else None

    def __call__(self, class_labels: list[int], guidance_scale: float = 4.0, *, generator: Any, **_: Any) -> Any:
        return self._draw(generator, class_labels=class_labels, guidance_scale=guidance_scale)


class _Unconditional(_Drawing):
    def __call__(self, batch_size: int = 1, *, generator: Any, num_inference_steps: int = 1000) -> Any:
        return self._draw(generator, batch_size=batch_size, num_inference_steps=num_inference_steps)


Serve = Callable[..., httpx.Client]


@pytest.fixture
def serve(start: Serve) -> Serve:
    """A client of a server of this pipeline."""
    return start


def generate(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post(GENERATIONS, json=body)


def refused(response: httpx.Response, param: str, text: str) -> None:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert text in error["message"]
    assert "\n" not in error["message"]


def test_a_text_model_is_asked_with_prompts(serve: Serve) -> None:
    pipe = _Text()
    client = serve(pipe)
    answer = generate(client, prompt="a cat", n=2, seed=3, negative_prompt="blue", guidance_scale=5)
    assert answer.status_code == 200
    assert [image["revised_prompt"] for image in answer.json()["data"]] == ["a cat"] * 2
    assert pipe.calls == [{"prompt": ["a cat"], "negative_prompt": ["blue"], "guidance_scale": 5.0}] * 2
    refused(generate(client), "prompt", "missing; say what to draw")
    refused(generate(client, prompt="  "), "prompt", "missing; say what to draw")
    refused(generate(client, prompt="a", class_label=1), "class_label", "this model takes a prompt")
    refused(generate(client, prompt="a", eta=0.5), "eta", "this model takes none")
    assert len(pipe.calls) == 2


def test_guidance_where_none_is_asked_for(serve: Serve) -> None:
    """A text model is drawn from as its pipeline does it, a model of classes with what digits are drawn with."""
    text, classes = _Text(), _Classes()
    client = serve(text)
    assert generate(client, prompt="a").status_code == 200
    assert client.get("/health").json()["takes"]["guidance_scale"] == 7.5
    assert generate(serve(classes), class_label=1).status_code == 200
    assert (text.calls[0]["guidance_scale"], classes.calls[0]["guidance_scale"]) == (7.5, 1.5)


@pytest.mark.parametrize(
    ("pipeline", "kind", "options", "own", "distilled", "wanted"),
    [
        ("StableDiffusionXLPipeline", "prompt", {"guidance_scale"}, 5.0, False, 5.0),
        ("StableDiffusionPipeline", "prompt", {"guidance_scale"}, None, False, 1.5),
        ("StableDiffusionPipeline", "prompt", set(), 7.5, False, 1.0),
        ("FluxPipeline", "prompt", {"guidance_scale"}, 3.5, True, 3.5),
        ("ClassConditionalLDMPipeline", "class_label", {"guidance_scale"}, 1.0, False, 1.5),
        ("DiTPipeline", "class_label", {"guidance_scale"}, 4.0, False, 1.0),  # of other classes than it was made for
        ("DDPMPipeline", "nothing", set(), None, False, 1.0),
    ],
)
def test_usual_guidance(
    pipeline: str, kind: Kind, options: set[str], own: float | None, distilled: bool, wanted: float
) -> None:
    needs = Needs(pipeline, kind, 10, frozenset(options), (8, 8), distilled=distilled, own_guidance=own)
    assert needs.usual_guidance(1.5) == wanted


def test_a_call_whose_guidance_has_no_number_by_default() -> None:
    class Unsaid(_Text):
        def __call__(
            self, prompt: list[str], guidance_scale: float | None = None, *, generator: Any = None, **_: Any
        ) -> Any: ...

    assert needs_of(Unsaid()).own_guidance is None
    assert needs_of(_Text()).own_guidance == 7.5


def test_classes_that_are_no_digits(serve: Serve) -> None:
    pipe = _Classes()
    client = serve(pipe)
    answer = generate(client, class_label=3)
    assert answer.json()["data"][0]["revised_prompt"] == "class 3"
    refused(generate(client, prompt="7"), "prompt", "this model knows no words; send class_label 0 to 9")
    refused(generate(client), "class_label", "missing; send class_label 0 to 9")
    refused(generate(client, class_label=10), "class_label", "the classes 0 to 9")
    refused(generate(client, class_label=1, negative_prompt="x"), "negative_prompt", "takes none")
    assert [call["class_labels"] for call in pipe.calls] == [[3]]


def test_an_unconditional_model_is_asked_with_nothing(serve: Serve) -> None:
    pipe = _Unconditional()
    client = serve(pipe)
    assert generate(client, n=2).status_code == 200
    answer = generate(client, prompt="clients of the images API always send one")
    assert "no prompt was used" in answer.json()["data"][0]["revised_prompt"]
    assert [call["batch_size"] for call in pipe.calls] == [1, 1, 1]
    refused(generate(client, class_label=1), "class_label", "unconditional")
    refused(generate(client, guidance_scale=3), "guidance_scale", "takes no guidance")
    assert generate(client, guidance_scale=1).status_code == 200


@pytest.mark.parametrize(
    ("model", "kind", "classes", "fields", "absent", "required"),
    [
        (_Text, "prompt", 0, {"prompt", "negative_prompt", "guidance_scale"}, {"class_label", "eta"}, ["prompt"]),
        (_Classes, "class_label", 10, {"class_label", "guidance_scale"}, {"prompt", "eta"}, ["class_label"]),
        (_Unconditional, "nothing", 0, {"n", "seed"}, {"prompt", "class_label", "guidance_scale"}, None),
    ],
)
def test_health_and_openapi_say_what_it_takes(
    serve: Serve,
    model: Callable[[], Any],
    kind: str,
    classes: int,
    fields: set[str],
    absent: set[str],
    required: list[str] | None,
) -> None:
    client = serve(model(), max_images=3)
    takes = client.get("/health").json()["takes"]
    assert (takes["kind"], takes["classes"], takes["size"]) == (kind, classes, "8x8")
    assert (takes["max_images"], takes["max_steps"]) == (3, 100)
    assert fields <= set(takes["fields"])
    assert not absent & set(takes["fields"])
    post = client.get("/openapi.json").json()["paths"][GENERATIONS]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    assert list(schema["properties"])[: len(takes["fields"])] == takes["fields"]
    others = set(schema["properties"]) - set(takes["fields"])
    assert all("Not of this model" in schema["properties"][name]["description"] for name in others)
    assert schema.get("required") == required


def test_digits_are_named_in_the_schema() -> None:
    needs = Needs("ClassConditionalLDMPipeline", "class_label", 10, frozenset(), (32, 32), digits=True)
    offer = Offer(needs, Limits())
    schema = request_schema(offer)
    assert "Names one digit" in schema["properties"]["prompt"]["description"]
    assert "required" not in schema
    assert job_of(request_from_body(b'{"prompt": "seven"}'), offer).label == 7


def test_steps_that_the_scheduler_refuses_are_a_bad_request(serve: Serve) -> None:
    pipe = _Text(LCMScheduler(original_inference_steps=8))
    client = serve(pipe)
    response = generate(client, prompt="a", num_inference_steps=9)
    refused(response, "num_inference_steps", "num_inference_steps: 9, LCMScheduler cannot take them")
    assert pipe.calls == []
    assert generate(client, prompt="a", num_inference_steps=8).status_code == 200
