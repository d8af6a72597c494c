// One image of POST /v1/images/generations as a stream of server-sent events.

/** What the server refuses, in the shape of OpenAI's errors. */
export class Refusal extends Error {
  constructor(status, { message, param = null, code = "" }, retryAfter = null) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

/**
 * Draws one image: `onPreview(base64, index)` is called for every preview.
 * Returns the last event, with `roundTrip` and `firstPreview` (or null) in milliseconds as seen from here.
 */
export async function draw(body, { key, signal, onPreview }) {
  const began = performance.now();
  const response = await post(body, key, signal);
  if (!response.ok) throw await refusalOf(response);
  let firstPreview = null;
  for await (const event of eventsOf(response.body)) {
    if (event.type === "error") throw new Refusal(500, event.error);
    if (event.type === "image_generation.partial_image") {
      firstPreview ??= performance.now() - began;
      onPreview(event.b64_json, event.partial_image_index);
    }
    if (event.type === "image_generation.completed") {
      return { ...event, firstPreview, roundTrip: performance.now() - began };
    }
  }
  throw new Error("the connection ended before the image was there");
}

async function post(body, key, signal) {
  try {
    return await fetch("v1/images/generations", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) },
      body: JSON.stringify({ ...body, stream: true }),
      signal,
    });
  } catch (error) {
    throw signal.aborted ? error : new Error("the server does not answer; does it still run?");
  }
}

async function refusalOf(response) {
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  try {
    return new Refusal(response.status, (await response.json()).error, retryAfter);
  } catch {
    return new Refusal(response.status, { message: `the server answered ${response.status}` }, retryAfter);
  }
}

/** The JSON of every event of a body. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").filter((line) => line.startsWith("data:"));
        if (data.length) yield JSON.parse(data.map((line) => line.slice(5)).join("\n"));
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // a stream that was cancelled rejects again
  }
}
