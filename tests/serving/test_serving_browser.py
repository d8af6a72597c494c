"""The pages as somebody uses them: mouse and keyboard in a headless Chromium, over a real server."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import Browser, Tab, find_chromium, started
from fake_backend import SIZE, FakeBackend
from PIL import Image
from served_app import served

from hqc.needs import Needs
from hqc.serving.guards import Rules
from hqc.serving.limits import Limits
from hqc.serving.tickets import Steps

DRAWN = "document.getElementById('status').textContent.startsWith('Drawn')"
PROMPT = Needs("StableDiffusionPipeline", "prompt", 0, frozenset({"guidance_scale", "negative_prompt"}), (SIZE, SIZE))
CLASSES = Needs("DiTPipeline", "class_label", 1000, frozenset({"guidance_scale"}), (SIZE, SIZE))
NOTHING = Needs("DDPMPipeline", "nothing", 0, frozenset(), (SIZE, SIZE))


class Stepped(FakeBackend):
    """Makes as many calls of its denoiser as it is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = threading.Semaphore(0)

    def denoise(self, calls: Any, at_once: int = 1) -> list[Any]:
        assert self.allowed.acquire(timeout=30)
        return super().denoise(calls, at_once)


class Brighter(FakeBackend):
    def begin(self, drawing: Any) -> Steps:
        return super().begin(replace(drawing, label=drawing.label + 5))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no chromium is installed")
    with started(program) as running:
        yield running


@pytest.fixture
def visit(browser: Browser) -> Iterator[Any]:
    """Opens the page of a server; in the end, nothing may have come from elsewhere."""
    tabs: list[tuple[Tab, str]] = []

    def begin(client: Any, path: str = "/") -> Tab:
        tab = browser.open(f"{client.base_url}{path}")
        tabs.append((tab, str(client.base_url)))
        if path == "/":
            tab.wait_for("!document.getElementById('draw').disabled")
        return tab

    yield begin
    for tab, own in tabs:
        asked = [event["request"]["url"] for event in tab.events("Network.requestWillBeSent")]
        assert [url for url in asked if not url.startswith((own, "data:image/png"))] == []
        tab.close()


def field(tab: Tab, name: str) -> Any:
    return tab.evaluate(f"document.getElementById('{name}').value")


def focused(tab: Tab) -> str:
    return str(tab.evaluate("document.activeElement.id || document.activeElement.name"))


def shown(tab: Tab, index: int = 0) -> Any:
    """Pixels of the image of a panel."""
    url = tab.evaluate(f"document.querySelectorAll('figure')[{index}].querySelector('img').src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def drawn(client: Any, **body: Any) -> Any:
    answer = client.post("/v1/images/generations", json=body).json()["data"][0]["b64_json"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer))))


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_previews_come_while_it_draws_then_the_image(start: Any, visit: Any) -> None:
    backend = Stepped()
    client = start(backend=backend)
    tab = visit(client)
    tab.click("input[name=tile][value='7']")
    tab.write("#num_inference_steps", "4")
    tab.click("#draw")
    tab.wait_for("document.querySelector('figure').getAttribute('aria-busy') === 'true'")
    assert not tab.evaluate("document.querySelector('figure img')")
    for index in range(3):
        backend.allowed.release()
        tab.wait_for(f"document.querySelector('figure img')?.alt.startsWith('Preview {index + 1}: 7, seed ')")
        assert tab.evaluate("document.getElementById('progress').value") == (index + 1) / 4
        assert f"preview {index + 1}" in tab.text("#status")
    early = shown(tab)
    backend.allowed.release()
    tab.wait_for(DRAWN)
    (begun,) = backend.begun
    assert (begun.label, begun.num_inference_steps, begun.seed) == (7, 4, int(field(tab, "seed")))
    backend.allowed.release(4)
    image = shown(tab)
    np.testing.assert_array_equal(image, drawn(client, class_label=7, num_inference_steps=4, seed=begun.seed))
    assert (image != early).any()
    facts = tab.text("dl").split("\n")
    assert facts[::2] == ["Time", "Queue", "First preview"]
    assert all(fact.endswith(" ms") for fact in facts[1::2])
    link = "document.querySelector('.download a')"
    assert tab.evaluate(f"{link}.download") == f"digits-test-7-seed-{begun.seed}.png"
    assert tab.evaluate(f"{link}.href") == tab.evaluate("document.querySelector('figure img').src")
    assert tab.evaluate("getComputedStyle(document.querySelector('figure img')).imageRendering") == "pixelated"
    assert tab.evaluate("document.getElementById('progress').hidden && document.getElementById('cancel').hidden")
    assert tab.complaints() == []


def test_two_models_side_by_side_from_the_same_seed(start: Any, visit: Any) -> None:
    first, second = FakeBackend(), Brighter()
    client = start(backend=first, beside=second)
    tab = visit(client)
    assert "Compare with beside" in tab.text("#compare-field")
    tab.click("#draw")
    tab.wait_for(DRAWN)
    titles = tab.evaluate("[...document.querySelectorAll('figcaption')].map((title) => title.innerText.trim())")
    assert titles == ["digits-test", "beside float", "Difference"]
    assert first.begun[0].seed == second.begun[0].seed == int(field(tab, "seed"))
    apart = np.abs(shown(tab, 0).astype(int) - shown(tab, 1).astype(int))
    assert apart.mean() > 1
    figures = tab.evaluate("document.querySelectorAll('figure')[2].querySelector('dl').innerText").split("\n")
    assert figures == ["Mean", f"{apart.mean():.2f} of 255", "Largest", f"{apart.max()} of 255"]
    seed = field(tab, "seed")
    tab.click("#compare")
    tab.click("#draw")
    tab.wait_for("document.querySelectorAll('figure').length === 1")
    tab.wait_for(DRAWN)
    assert len(second.begun) == 1
    assert field(tab, "seed") != seed

    tab.click("#history li:last-child button")  # the first drawing again
    tab.wait_for("document.querySelectorAll('figure').length === 3")
    assert field(tab, "seed") == seed
    assert not tab.evaluate("document.getElementById('random').checked")
    assert len(first.begun) == 2
    assert tab.complaints() == []


def test_the_keyboard_alone(start: Any, visit: Any) -> None:
    backend = FakeBackend()
    tab = visit(start(backend=backend))
    seen = []
    for _ in range(10):
        tab.press("Tab")
        seen.append(focused(tab))
        if seen[-1] == "tile":
            tab.press("ArrowRight", 3)
        if seen[-1] == "random":
            tab.press(" ")
        if seen[-1] == "seed":
            tab.send("Input.insertText", text="42")
        outline = "getComputedStyle(document.activeElement.name === 'tile' ? document.activeElement.nextSibling"
        assert tab.evaluate(f"{outline} : document.activeElement).outlineStyle") == "solid"
    fields = ["tile", "seed", "random", "num_inference_steps", "guidance_scale", "scheduler", "lora", "lora", "draw"]
    assert seen == ["", *fields]
    tab.press("Enter")
    tab.wait_for(DRAWN)
    assert (backend.begun[0].label, focused(tab)) == (3, "draw")
    tab.write("#seed", "5")  # typing a seed ends the random ones
    tab.press("Enter")
    wait_until(lambda: len(backend.begun) == 2)
    assert (backend.begun[1].label, backend.begun[1].seed) == (3, 5)
    tab.wait_for(DRAWN)
    assert tab.complaints() == []


def test_what_is_refused_is_said_at_its_field(start: Any, visit: Any) -> None:
    backend = FakeBackend()
    tab = visit(start(backend=backend, max_steps=50))
    alert = "document.getElementById('error').textContent"
    tab.write("#num_inference_steps", "51")
    tab.press("Enter")
    assert tab.wait_for(alert) == "num_inference_steps: 51, this server takes at most 50"
    assert focused(tab) == "num_inference_steps"
    assert tab.evaluate("document.activeElement.getAttribute('aria-invalid')") == "true"
    (complaint,) = tab.complaints()  # the browser's own line about the answer
    assert "400" in complaint
    tab.write("#seed", "-1")
    tab.press("Enter")
    assert tab.wait_for(alert) == "seed: -1, expected a whole number from 0 on"
    tab.write("#seed", str(2**53))
    tab.press("Enter")
    tab.wait_for(f"{alert}.startsWith('seed: above {2**53 - 1}')")
    assert backend.begun == []
    tab.write("#seed", "1")
    tab.write("#num_inference_steps", "50")
    tab.press("Enter")
    tab.wait_for(DRAWN)
    assert tab.evaluate(alert) == ""
    assert not tab.evaluate("document.querySelector('[aria-invalid]')")


@pytest.mark.parametrize("way", ["click", "Escape"])
def test_cancel_drops_the_request(start: Any, visit: Any, way: str) -> None:
    backend = Stepped()
    client = start(backend=backend)
    tab = visit(client)
    tab.write("#num_inference_steps", "40")
    tab.press("Enter")
    wait_until(lambda: client.engine.running == 1)
    tab.press("Enter")  # does nothing now
    tab.click("#cancel") if way == "click" else tab.press("Escape")
    tab.wait_for("document.getElementById('status').textContent === 'Cancelled.'")
    while client.engine.running:  # the step that runs, and those until the server has noticed
        backend.allowed.release()
        time.sleep(0.05)
    assert len(backend.begun) == 1
    assert len(backend.batches) < 30
    assert tab.text("dl") == "Time\nnot finished"
    backend.allowed.release(100)
    tab.write("#num_inference_steps", "4")
    tab.press("Enter")
    tab.wait_for(DRAWN)
    assert tab.complaints() == []


def test_a_full_line_says_when_to_come_back(start: Any, visit: Any) -> None:
    backend = Stepped()
    client = start(backend=backend, max_batch=1, max_queue=0)
    tab = visit(client)
    other = threading.Thread(target=client.post, args=("/v1/images/generations",), kwargs={"json": {"prompt": "1"}})
    other.start()
    wait_until(lambda: client.engine.running == 1)
    tab.click("#draw")
    text = tab.wait_for("document.getElementById('error').textContent")
    assert text.startswith("The server is busy. Try again in ")
    assert text.endswith(" s.")
    backend.allowed.release(100)
    other.join(30)


def test_a_model_that_fails_in_the_middle(start: Any, visit: Any) -> None:
    backend = FakeBackend()
    backend.failure = RuntimeError("secret")
    tab = visit(start(backend=backend))
    tab.click("#draw")
    text = tab.wait_for("document.getElementById('error').textContent")
    assert text == "internal error; the server's log has it"


def test_a_key_is_asked_for_and_kept_in_memory(start: Any, visit: Any) -> None:
    tab = visit(start(backend=FakeBackend(), rules=Rules(api_key="open-sesame")))
    assert tab.evaluate("document.getElementById('key-field').hidden")
    tab.click("#draw")
    tab.wait_for("!document.getElementById('key-field').hidden")
    assert "no such API key" in tab.text("#error")
    assert focused(tab) == "key"
    tab.send("Input.insertText", text="open-sesame")
    tab.press("Enter")
    tab.wait_for(DRAWN)
    assert tab.evaluate("document.getElementById('key').type") == "password"
    assert tab.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


@pytest.mark.parametrize(
    ("needs", "fields"),
    [
        (PROMPT, ["prompt", "negative_prompt", "guidance_scale"]),
        (CLASSES, ["class_label", "guidance_scale"]),
        (NOTHING, []),
    ],
)
def test_the_form_follows_the_model(start: Any, visit: Any, needs: Needs, fields: list[str]) -> None:
    backend = FakeBackend()
    backend.needs, backend.schedulers, backend.loras, backend.previews = needs, (), (), False  # type: ignore[misc]
    tab = visit(start(backend=backend))
    ids = [
        "tiles",
        "prompt",
        "negative_prompt",
        "class_label",
        "guidance_scale",
        "scheduler",
        "loras",
        "compare",
        "key",
    ]
    visible = [name for name in ids if tab.evaluate(f"!document.getElementById('{name}').closest('[hidden]')")]
    assert visible == fields
    if "prompt" in fields:
        tab.write("#prompt", "<b>a cat</b>")
        tab.press("Enter")
    elif "class_label" in fields:
        tab.write("#class_label", "999")
        tab.press("Enter")
    else:
        tab.click("#draw")
    tab.wait_for(DRAWN)
    (begun,) = backend.begun
    wanted = {"prompt": ("<b>a cat</b>", 0), "class_label": (None, 999), "nothing": (None, 0)}[needs.kind]
    assert (begun.prompt, begun.label) == wanted
    assert ("<b>a cat</b>" in tab.text("#status")) == ("prompt" in fields)
    assert tab.text("dl").split("\n")[::2] == ["Time", "Queue"]
    assert tab.complaints() == []


def test_scales_of_loras(start: Any, visit: Any) -> None:
    backend = FakeBackend()
    tab = visit(start(backend=backend))
    assert "ink" in tab.text("#loras")
    tab.click("#draw")
    tab.wait_for(DRAWN)
    tab.write("input[data-lora=oil]", "-0.5")
    tab.press("Enter")
    wait_until(lambda: len(backend.begun) == 2)
    assert [each.loras for each in backend.begun] == [(), (("oil", -0.5),)]
    tab.wait_for("document.querySelectorAll('#history button').length === 2")
    tab.click("#history li:last-child button")
    tab.wait_for("document.querySelector('input[data-lora=oil]').value === ''")
    tab.click("#history li:first-child button")
    tab.wait_for("document.querySelector('input[data-lora=oil]').value === '-0.5'")
    assert tab.complaints() == []


CONTRAST = """(() => {
  const channel = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = numbers(color).map(channel);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const color = getComputedStyle(each).backgroundColor;
      if ((numbers(color)[3] ?? 1) === 1) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const text = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  return [...document.body.querySelectorAll('*')]
    .filter((element) => element.checkVisibility() && (text(element) || element.matches('input, select, textarea')))
    .map((element) => {
      const [a, b] = [light(getComputedStyle(element).color), light(ground(element))];
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      return [ratio, `${element.tagName} ${element.textContent.slice(0, 30)}`];
    });
})()"""


def check_contrast(tab: Tab) -> None:
    for scheme in ("light", "dark"):
        tab.media(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
        found = tab.evaluate(CONTRAST)
        assert len(found) > 20
        assert [each for each in found if each[0] < 4.5] == []


def check_widths(tab: Tab) -> None:
    for width in (320, 700, 1280):
        tab.resize(width, 800)
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), width


def check_names(tab: Tab) -> None:
    """All that can have the focus says what it is."""
    nodes = tab.send("Accessibility.getFullAXTree")["nodes"]
    reached = [node for node in nodes if any(each["name"] == "focusable" for each in node.get("properties", ()))]
    assert len(reached) > 10
    assert [node["role"]["value"] for node in reached if not node.get("name", {}).get("value")] == []


def test_contrast_names_and_width_of_the_page(start: Any, visit: Any) -> None:
    backend = Stepped()
    client = start(backend=backend, beside=Brighter())
    tab = visit(client)
    tab.write("#seed", "x")
    tab.press("Enter")
    tab.wait_for("document.getElementById('error').textContent")
    tab.evaluate("document.getElementById('key-field').hidden = false")
    check_contrast(tab)
    check_widths(tab)
    tab.write("#seed", "1")
    tab.press("Enter")
    tab.wait_for("!document.getElementById('cancel').hidden")
    check_contrast(tab)
    assert tab.evaluate("document.getAnimations().length") == 0  # motion is reduced
    backend.allowed.release(100)
    tab.wait_for(DRAWN)
    check_contrast(tab)
    check_widths(tab)
    check_names(tab)


def test_contrast_names_and_width_of_the_reference(start: Any, visit: Any) -> None:
    tab = visit(start(backend=FakeBackend()), "/docs")
    tab.wait_for("document.querySelectorAll('section').length > 1")
    check_contrast(tab)
    check_widths(tab)
    check_names(tab)


def test_focus_buttons_and_progress_where_the_system_gives_the_colours(start: Any, visit: Any) -> None:
    """Measured on the picture: grounds and shadows of the page's own are not painted then."""
    backend = Stepped()
    tab = visit(start(backend=backend))
    tab.media(forced_colors="active", prefers_reduced_motion="reduce")
    tab.write("#seed", "x")
    tab.click("#draw")
    tab.wait_for("document.getElementById('error').textContent")
    edges = "(name) => getComputedStyle(document.getElementById(name)).borderTopWidth"
    assert tab.evaluate(f"({edges})('seed')") != tab.evaluate(f"({edges})('num_inference_steps')")
    tab.write("#seed", "1")
    tab.write("#num_inference_steps", "2")
    tab.click("#draw")
    backend.allowed.release()
    tab.wait_for("document.getElementById('progress').value === 0.5")
    tab.wait_for("document.querySelector('figure img')?.naturalWidth")  # nothing moves any more
    tab.evaluate("document.getElementById('draw').focus()")
    tab.press("Tab")
    assert focused(tab) == "cancel"
    # Along the middle of the bar: what is done, what is not; its rim against the page above. It is painted late.
    for _ in range(20):
        done, left = (colour_at(tab, "progress", x, 0.5) for x in (0.25, 0.75))
        if contrast(done, left) >= 3:
            break
    assert contrast(done, left) >= 3
    assert contrast(colour_at(tab, "progress", 0.75, 0, 0.5), colour_at(tab, "progress", 0.75, 0, -4)) >= 3
    for button in ("draw", "cancel"):
        assert contrast(colour_at(tab, button, 0.5, 0, 0.5), colour_at(tab, button, 0.5, 0, -1)) >= 3, button
    assert contrast(colour_at(tab, "cancel", 0.5, 0, -3.5), colour_at(tab, "cancel", 0.5, 0, -1)) >= 3  # the focus
    assert tab.evaluate("getComputedStyle(document.getElementById('draw')).color") != tab.evaluate(
        "getComputedStyle(document.getElementById('cancel')).color"
    )
    backend.allowed.release(10)


def colour_at(tab: Tab, name: str, x: float, y: float, below: float = 0) -> tuple[int, ...]:
    """What is painted at shares of the width and height of an element, some pixels below that."""
    script = """async (name) => {
        const element = document.getElementById(name);
        element.scrollIntoView({ block: "center" });
        const frame = () => new Promise((painted) => requestAnimationFrame(painted));
        await frame();
        await frame();
        const box = element.getBoundingClientRect();
        return [box.x, box.y, box.width, box.height];
    }"""
    left, top, width, height = tab.evaluate(f"({script})({name!r})")
    with Image.open(io.BytesIO(tab.screenshot())) as picture:
        found = picture.convert("RGB").getpixel((int(left + x * width), int(top + y * height + below)))
    assert isinstance(found, tuple)
    return found


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    def light(colour: tuple[int, ...]) -> float:
        parts = [v / 255 / 12.92 if v / 255 <= 0.04045 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    dark, bright = sorted((light(one), light(other)))
    return (bright + 0.05) / (dark + 0.05)


def test_the_reference_lists_every_route_and_its_example_runs(
    start: Any, visit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start(backend=FakeBackend())
    tab = visit(client, "/docs")
    schema = client.get("/openapi.json").json()
    routes = [f"{method.upper()} {path}" for path, methods in schema["paths"].items() for method in methods]
    tab.wait_for(f"document.querySelectorAll('section').length === {len(routes) + 1}")
    assert tab.evaluate("[...document.querySelectorAll('h2 code')].map((code) => code.textContent)") == routes
    text = tab.text("main")
    fields = client.get("/health").json()["takes"]["fields"]
    assert all(
        name in text for name in (*fields, "data[].b64_json", "metrics.queue_seconds", "object, ink, oil: number")
    )
    assert "negative_prompt" not in text  # this model takes none
    assert "null" not in text.replace("Null is", "").lower()
    codes = tab.evaluate("[...document.querySelectorAll('pre')].map((pre) => pre.textContent)")
    monkeypatch.chdir(tmp_path)
    exec(compile(codes[2], "example", "exec"), {})
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (SIZE, SIZE)
    body = codes[0].partition("-d '")[2].removesuffix("'")
    answer = client.post("/v1/images/generations", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200
    streamed = codes[1].partition("-d '")[2].removesuffix("'")
    events = client.post("/v1/images/generations", content=streamed, headers={"Content-Type": "application/json"}).text
    kinds = {line.removeprefix("event: ") for line in events.splitlines() if line.startswith("event: ")}
    assert kinds == {"image_generation.partial_image", "image_generation.completed"}
    assert all(kind in text for kind in kinds)
    assert tab.complaints() == []


def test_a_server_that_has_ended(browser: Browser) -> None:
    with served(FakeBackend(), Limits()) as client:
        tab = browser.open(f"{client.base_url}/")
        tab.wait_for("!document.getElementById('draw').disabled")
    tab.click("#draw")
    text = tab.wait_for("document.getElementById('error').textContent")
    assert text == "the server does not answer; does it still run?"
    tab.close()
