// The reference at /docs: the routes of openapi.json as plain tables, and what to type.

import { byId, make, readJson } from "./elements.js";

const GENERATIONS = "/v1/images/generations";
const COMMON = "b64_json, created_at, size, quality, background, output_format";
const EVENTS = [
  ["image_generation.partial_image", `${COMMON}, partial_image_index`, "a preview, 0 the first"],
  ["image_generation.completed", `${COMMON}, usage, metrics, seed`, "the image, and the end"],
  ["error", "error", "the end without an image; the shape is that of every refusal"],
];

try {
  const [schema, health] = await Promise.all([readJson("openapi.json"), readJson("health")]);
  byId("served").textContent = `${health.model}, hqc ${schema.info.version}`;
  byId("reference").append(examples(health));
  leaveOut(schema, health.takes);
  for (const [path, methods] of Object.entries(schema.paths)) {
    for (const [method, route] of Object.entries(methods)) byId("reference").append(routeOf(schema, path, method, route));
  }
} catch (error) {
  byId("error").textContent = error.message;
}

/** The same request with curl and with the openai client. */
function examples({ takes, model }) {
  const base = new URL("v1", document.baseURI);
  const asked = takes.kind === "class_label" ? { class_label: Math.min(7, takes.classes - 1) } : {};
  if (takes.kind === "prompt") asked.prompt = "a red bicycle";
  const body = JSON.stringify({ ...asked, seed: 1, num_inference_steps: takes.num_inference_steps });
  const curl = (more, sent) =>
    `curl ${more}${base.origin}${base.pathname}/images/generations \\\n` +
    `  -H 'Content-Type: application/json' \\\n  -d '${sent}'`;
  const { prompt = "", ...extra } = JSON.parse(body);
  const words = takes.digits ? "a handwritten seven" : prompt;
  if (takes.digits) delete extra.class_label;
  const python = [
    "import base64",
    "import openai",
    "",
    `client = openai.OpenAI(base_url=${JSON.stringify(base.href)}, api_key="the server's, or anything")`,
    "answer = client.images.generate(",
    `    model=${JSON.stringify(model)},`,
    `    prompt=${JSON.stringify(words)},`,
    `    extra_body=${JSON.stringify(extra).replaceAll(",", ", ").replaceAll(":", ": ")},`,
    ")",
    'with open("image.png", "wb") as file:',
    "    file.write(base64.b64decode(answer.data[0].b64_json))",
  ].join("\n");
  const streamed = JSON.stringify({ ...JSON.parse(body), stream: true, partial_images: takes.previews ? 3 : 0 });
  const section = make("section", {}, make("h2", { textContent: "Examples" }));
  for (const [title, text] of [
    ["curl", curl("", body)],
    ["curl, with events as they come", curl("-N ", streamed)],
    ["Python, the openai client", python],
  ]) {
    section.append(make("h3", { textContent: title }), scrolled(title, make("pre", {}, make("code", { textContent: text }))));
  }
  return section;
}

/** Drops the fields that this model takes neutral values of alone, for clients that always send them. */
function leaveOut(schema, { fields }) {
  const request = schema.paths[GENERATIONS].post.requestBody.content["application/json"].schema;
  request.properties = Object.fromEntries(Object.entries(request.properties).filter(([name]) => fields.includes(name)));
}

/** A route: what it does, its fields, its answers. */
function routeOf(schema, path, method, route) {
  const heading = `${method.toUpperCase()} ${path}`;
  const section = make(
    "section",
    {},
    make("h2", {}, make("code", { textContent: heading })),
    make("p", {}, ...inline(route.description ?? route.summary)),
  );
  for (const { title, about, fields } of tablesOf(schema, route)) {
    section.append(make("h3", { textContent: title }), make("p", {}, ...inline(about)));
    section.append(table(`${title}, ${heading}`, ["Field", "Type", "Meaning"], fields));
  }
  if (path === GENERATIONS) {
    section.append(make("h3", { textContent: "Events of a stream" }));
    section.append(table(`Events, ${heading}`, ["Type", "Fields", "Meaning"], EVENTS));
  }
  const answers = Object.entries(route.responses)
    .filter(([status]) => status !== "422") // the framework's, which this server never sends
    .map(([status, { description, content = {} }]) => [status, Object.keys(content).join(", "), description]);
  section.append(make("h3", { textContent: "Answers" }), table(`Answers, ${heading}`, ["Status", "Type", "Meaning"], answers));
  return section;
}

function tablesOf(schema, route) {
  const tables = [];
  const parameters = (route.parameters ?? []).map((each) => [each.name, typeOf(schema, each.schema), `in the ${each.in}`]);
  if (parameters.length) tables.push({ title: "Parameters", about: "", fields: parameters });
  const body = jsonOf(schema, route.requestBody);
  if (body) tables.push({ title: "Request", about: body.description, fields: fieldsOf(schema, body) });
  const answer = jsonOf(schema, route.responses["200"]);
  if (answer) tables.push({ title: "Answer", about: answer.description, fields: fieldsOf(schema, answer) });
  return tables;
}

function jsonOf(schema, part) {
  const found = part?.content?.["application/json"]?.schema;
  return found && followed(schema, found).properties ? followed(schema, found) : null;
}

/** Rows of a schema's fields; those of objects inside follow as `outer.inner`. */
function fieldsOf(schema, object, before = "") {
  return Object.entries(object.properties).flatMap(([name, field]) => {
    const inner = followed(schema, field.items ?? field);
    const path = `${before}${name}${field.items ? "[]" : ""}`;
    const required = object.required?.includes(name) && !before && object.additionalProperties === false;
    const row = [path, typeOf(schema, field), `${field.description ?? ""}${required ? " Required." : ""}`];
    return inner.properties ? [row, ...fieldsOf(schema, inner, `${path}.`)] : [row];
  });
}

function followed(schema, field) {
  return field.$ref ? schema.components.schemas[field.$ref.split("/").pop()] : field;
}

/** A field's type and bounds, in words. */
function typeOf(schema, field) {
  if (field.anyOf) {
    const kinds = field.anyOf.filter((each) => each.type !== "null");
    return kinds.map((each) => typeOf(schema, each)).join(" or ");
  }
  if (field.$ref) return "object";
  if (field.const !== undefined) return JSON.stringify(field.const);
  if (field.enum) return field.enum.map((value) => JSON.stringify(value)).join(", ");
  if (Array.isArray(field.type)) return typeOf(schema, { ...field, type: field.type.find((type) => type !== "null") });
  if (field.additionalProperties?.type) {
    const names = field.propertyNames?.enum?.join(", ") ?? "name";
    return `object, ${names}: ${typeOf(schema, field.additionalProperties)}`;
  }
  if (field.items) return `list of ${typeOf(schema, field.items)}`;
  const least = field.minimum;
  const most = field.maximum > Number.MAX_SAFE_INTEGER ? "2⁶³−1" : field.maximum;
  if (least !== undefined && most !== undefined) return `${field.type}, ${least} to ${most}`;
  if (least !== undefined) return `${field.type}, from ${least}`;
  if (most !== undefined) return `${field.type}, at most ${most}`;
  return field.maxLength ? `${field.type}, up to ${field.maxLength} characters` : (field.type ?? "any");
}

function table(name, titles, rows) {
  const head = make("tr", {}, ...titles.map((title) => make("th", { scope: "col", textContent: title })));
  const body = rows.map(([first, ...others]) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, make("code", { textContent: first })),
      ...others.map((text) => make("td", {}, ...inline(text))),
    ),
  );
  return scrolled(name, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

/** Text with what stands in backticks as code. */
function inline(text = "") {
  return text.split("`").map((part, index) => (index % 2 ? make("code", { textContent: part }) : part));
}

/** What may be wider than the page, reachable with the keyboard. */
function scrolled(name, content) {
  const box = make("div", { className: "scroll", tabIndex: 0 }, content);
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", name);
  return box;
}
