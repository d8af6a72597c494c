// The form: what it offers follows GET /health, what it asks for are fields of the API by their own names.

import { byId, make } from "./elements.js";

const MOST_TILES = 20;
const RANDOM_SEEDS = 1_000_000; // short enough to be read out

/** Shows the fields that the model takes. */
export function offer({ takes, models }) {
  const show = (id, applies) => (byId(id).hidden = !applies);
  const classes = takes.kind === "class_label";
  const tiles = classes && takes.classes <= MOST_TILES;
  if (tiles) addTiles(takes);
  show("tiles", tiles);
  show("class-field", classes && !tiles);
  show("prompt-field", takes.kind === "prompt");
  show("negative-field", takes.fields.includes("negative_prompt"));
  show("guidance-field", takes.fields.includes("guidance_scale"));
  show("scheduler-field", takes.schedulers.length > 0);
  show("loras", takes.loras.length > 0);
  show("compare-field", models.length > 1);
  byId("class_label").max = takes.classes - 1;
  byId("class-field").querySelector(".hint").textContent = `0 to ${takes.classes - 1}`;
  const steps = byId("num_inference_steps");
  Object.assign(steps, { value: takes.num_inference_steps, max: takes.max_steps });
  steps.labels[0].querySelector(".hint").textContent = `to ${takes.max_steps}`;
  byId("guidance_scale").value = takes.guidance_scale;
  for (const name of takes.schedulers) byId("scheduler").append(new Option(name));
  byId("loras").querySelector(".pair").append(...takes.loras.map(scaleOf));
  byId("compare-field").querySelector("span").textContent = `Compare with ${models[1]}`;
  byId("prompt").addEventListener("keydown", drawOnEnter);
  byId("negative_prompt").addEventListener("keydown", drawOnEnter);
  byId("seed").addEventListener("input", () => (byId("random").checked = false));
}

function addTiles({ classes, digits }) {
  byId("tiles").querySelector("legend").textContent = digits ? "Digit" : "Class";
  const tile = (label) =>
    make(
      "label",
      {},
      make("input", { type: "radio", name: "tile", value: label, checked: label === 0 }),
      make("span", { textContent: label }),
    );
  byId("tiles").querySelector(".tiles").append(...Array.from({ length: classes }, (_, label) => tile(label)));
}

function scaleOf(lora) {
  const scale = make("input", { type: "number", inputMode: "decimal", step: 0.1, name: "lora" });
  scale.dataset.lora = lora;
  return make("p", { className: "field" }, make("label", {}, make("span", { textContent: lora }), scale));
}

function drawOnEnter(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("form").requestSubmit();
}

/** A number that cannot be sent: `param` is the field. */
export class WrongField extends Error {
  constructor(param, message) {
    super(`${param}: ${message}`);
    this.param = param;
  }
}

/** The fields of a request, as they stand; an empty one is left out. A random seed is drawn, and shown. */
export function asked({ takes }) {
  if (byId("random").checked) byId("seed").value = Math.floor(Math.random() * RANDOM_SEEDS);
  const body = { seed: wholeNumber("seed") };
  if (takes.kind === "class_label") body.class_label = classLabel();
  for (const id of ["prompt", "negative_prompt"]) if (applies(id)) body[id] = byId(id).value;
  for (const id of ["num_inference_steps", "guidance_scale"]) {
    if (applies(id) && byId(id).value !== "") body[id] = Number(byId(id).value);
    if (byId(id).validity.badInput) throw new WrongField(id, "not a number");
  }
  if (byId("scheduler").value) body.scheduler = byId("scheduler").value;
  const scales = scaleFields().filter((each) => each.value !== "");
  if (scales.length) body.loras = Object.fromEntries(scales.map((each) => [each.dataset.lora, Number(each.value)]));
  if (takes.previews) body.partial_images = 3;
  return body;
}

/** Fills the form with the fields of an earlier request; its seed stays. */
export function fill(body) {
  byId("random").checked = false;
  for (const id of ["seed", "class_label", "prompt", "negative_prompt", "num_inference_steps", "guidance_scale"]) {
    if (body[id] !== undefined) byId(id).value = body[id];
  }
  byId("scheduler").value = body.scheduler ?? "";
  for (const each of scaleFields()) each.value = body.loras?.[each.dataset.lora] ?? "";
  const tile = document.querySelector(`input[name=tile][value="${body.class_label}"]`);
  if (tile) tile.checked = true;
}

/** In words, what a request asks for. */
export function inWords(body) {
  const what = body.prompt ?? (body.class_label === undefined ? "an image" : String(body.class_label));
  return `${what.length > 60 ? `${what.slice(0, 60)}…` : what}, seed ${body.seed}`;
}

function classLabel() {
  const tile = document.querySelector("input[name=tile]:checked");
  return tile ? Number(tile.value) : wholeNumber("class_label");
}

function wholeNumber(id) {
  const text = byId(id).value.trim();
  if (!/^\d+$/.test(text)) throw new WrongField(id, `${text || "nothing"}, expected a whole number from 0 on`);
  if (Number(text) > Number.MAX_SAFE_INTEGER) {
    throw new WrongField(id, `above ${Number.MAX_SAFE_INTEGER}, the largest that a page can send`);
  }
  return Number(text);
}

function scaleFields() {
  return [...document.querySelectorAll("input[name=lora]")];
}

function applies(id) {
  return byId(id).closest("[hidden]") === null;
}
