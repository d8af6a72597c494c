// The page at /: asks the server what it takes, draws, and shows what comes.

import { difference } from "./difference.js";
import { byId, readJson } from "./elements.js";
import { asked, fill, inWords, offer } from "./form.js";
import { Panel, differencePanel, milliseconds, remember, urlOf } from "./results.js";
import { draw } from "./stream.js";

let health = null;
let running = null; // the AbortController of what is being drawn

try {
  health = await readJson("health");
  start();
} catch (error) {
  complain(error);
}

function start() {
  document.title = `hqc: ${health.model}`;
  byId("served").textContent = `${health.model} on ${health.runtime}`;
  offer(health);
  byId("draw").disabled = false;
  byId("form").addEventListener("submit", submitted);
  byId("cancel").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
}

async function submitted(event) {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  forgive();
  try {
    const body = asked(health);
    lock();
    await drawAll(body, running.signal);
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled.");
    else complain(error);
  } finally {
    unlock();
  }
}

/** One model after the other, so that neither slows the other's time. */
async function drawAll(body, signal) {
  const models = health.models.slice(0, byId("compare").checked ? 2 : 1);
  const words = inWords(body);
  const panels = models.map((model, index) => new Panel(model, index ? "float" : "", health.takes.size));
  byId("panels").replaceChildren(...panels.map((panel) => panel.element));
  if (matchMedia("(max-width: 55.99rem)").matches) byId("panels").scrollIntoView({ block: "nearest" });
  const drawings = [];
  for (const [index, model] of models.entries()) {
    drawings.push(await drawOne({ ...body, model }, panels[index], words, signal));
  }
  const drawing = { body, words, drawings };
  await finish(drawing);
  remember(drawing, () => showAgain(drawing));
}

async function drawOne(body, panel, words, signal) {
  const previews = body.partial_images ? Math.min(3, (body.num_inference_steps ?? 4) - 1) : 0;
  const began = performance.now();
  const clock = setInterval(() => panel.tell({ Time: milliseconds(performance.now() - began) }), 100);
  const onPreview = (base64, index) => {
    panel.show(base64, `Preview ${index + 1}: ${words}`);
    progressed((index + 1) / (Math.max(previews, index + 1) + 1));
    say(`${body.model}: preview ${index + 1}.`);
  };
  say(`${body.model} draws ${words}.`);
  progressed(previews ? 0 : null);
  panel.busy = true;
  try {
    const drawn = await draw(body, { key: byId("key").value, signal, onPreview });
    const named = { ...drawn, model: body.model };
    panel.complete(named, words);
    return named;
  } catch (error) {
    panel.tell({ Time: "not finished" });
    throw error;
  } finally {
    clearInterval(clock);
    panel.busy = false;
  }
}

/** Adds the difference of two images, and sums up. */
async function finish({ words, drawings }) {
  const times = drawings.map((drawn) => `${drawn.model} in ${milliseconds(1000 * drawn.metrics.seconds)}`);
  let apart = "";
  if (drawings.length === 2) {
    const found = await difference(...drawings.map((drawn) => urlOf(drawn.b64_json)));
    byId("panels").append(differencePanel(found, health.takes.size).element);
    apart = ` Mean difference ${found.mean.toFixed(2)} of 255.`;
  }
  say(`Drawn: ${words}; ${times.join(", ")}.${apart}`);
}

async function showAgain(drawing) {
  if (running) return;
  forgive();
  fill(drawing.body);
  const panels = drawing.drawings.map((drawn, index) => {
    const panel = new Panel(drawn.model, index ? "float" : "", health.takes.size);
    panel.complete(drawn, drawing.words);
    return panel.element;
  });
  byId("panels").replaceChildren(...panels);
  await finish(drawing);
}

function lock() {
  byId("draw").setAttribute("aria-disabled", "true"); // not disabled: focus stays where it is
  byId("cancel").hidden = false;
  byId("progress").hidden = false;
}

function unlock() {
  running = null;
  byId("draw").removeAttribute("aria-disabled");
  if (document.activeElement === byId("cancel")) byId("draw").focus();
  byId("cancel").hidden = true;
  byId("progress").hidden = true;
}

/** null: how far it is cannot be told. */
function progressed(share) {
  if (share === null) byId("progress").removeAttribute("value");
  else byId("progress").value = share;
}

function say(text) {
  byId("status").textContent = text;
}

function forgive() {
  byId("error").textContent = "";
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
}

/** Says what was wrong, and goes to the field at fault. */
function complain(error) {
  const retry = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  const text = error.status === 429 ? `The server is busy.${retry}` : error.message;
  byId("error").textContent = text;
  say("");
  if (error.status === 401) byId("key-field").hidden = false;
  const field = error.status === 401 ? byId("key") : byId("form").querySelector(`#${CSS.escape(error.param ?? "none")}`);
  if (!field || field.closest("[hidden]")) return;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", "error");
  field.focus();
}
