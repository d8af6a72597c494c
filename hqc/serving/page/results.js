// What has been drawn: a panel a model, their difference, and the strip of earlier images.

import { byId, make } from "./elements.js";

const MOST_EARLIER = 12;
const TINY = 160; // px; below, an image is enlarged with its pixels as they are

/** Milliseconds; tenths of a short time. */
export function milliseconds(value) {
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
}

export const urlOf = (base64) => `data:image/png;base64,${base64}`;

/** A panel for one image of a model, empty at first. */
export class Panel {
  constructor(title, tag, size) {
    this.element = byId("panel").content.firstElementChild.cloneNode(true);
    this.frame = this.element.querySelector(".frame");
    this.element.querySelector("b").textContent = title;
    this.element.querySelector(".tag").textContent = tag;
    const [width, height] = size.split("x").map(Number);
    this.frame.style.aspectRatio = `${width} / ${height}`;
    this.frame.classList.toggle("tiny", width < TINY);
    this.size = { width, height };
  }

  /** Whether an image is on its way. */
  set busy(value) {
    this.element.setAttribute("aria-busy", value);
  }

  /** Shows an image in place of the one before. */
  show(base64, alt) {
    const image = this.frame.querySelector("img") ?? make("img", this.size);
    Object.assign(image, { src: urlOf(base64), alt });
    if (!image.isConnected) this.frame.append(image);
  }

  /** Shows pairs of name and text under the image. */
  tell(facts) {
    const pairs = Object.entries(facts).map(([name, text]) =>
      make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: text })),
    );
    this.element.querySelector("dl").replaceChildren(...pairs);
  }

  /** Shows the image of a stream that has ended, its times, and a link that saves it. */
  complete(drawn, words) {
    this.show(drawn.b64_json, `${words}, drawn by ${drawn.model}`);
    const { seconds, queue_seconds: queued } = drawn.metrics;
    this.tell({
      Time: milliseconds(1000 * seconds),
      Queue: milliseconds(1000 * queued),
      ...(drawn.firstPreview === null ? {} : { "First preview": milliseconds(drawn.firstPreview) }),
    });
    const link = this.element.querySelector(".download a");
    Object.assign(link, { href: urlOf(drawn.b64_json), download: fileName(drawn.model, words) });
    link.setAttribute("aria-label", `Download the image of ${drawn.model}`);
    link.parentElement.hidden = false;
  }
}

/** A panel of how far two images are apart. */
export function differencePanel({ mean, largest, canvas }, size) {
  const panel = new Panel("Difference", "", size);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "The absolute difference of every pixel: black where there is none, white where it is largest");
  panel.frame.append(canvas);
  panel.tell({ Mean: `${mean.toFixed(2)} of 255`, Largest: `${largest} of 255` });
  return panel;
}

/** Puts a drawing in front of the earlier ones; `choose` is called when it is chosen again. */
export function remember({ drawings, words }, choose) {
  byId("history").hidden = false;
  const images = drawings.map((drawn) => make("img", { src: urlOf(drawn.b64_json), alt: "" }));
  const again = make("button", { type: "button", title: words, onclick: choose }, ...images);
  again.setAttribute("aria-label", `Show again: ${words}`);
  const list = byId("history").querySelector("ul");
  list.prepend(make("li", {}, again));
  while (list.children.length > MOST_EARLIER) list.lastElementChild.remove();
}

function fileName(model, words) {
  const plain = `${model}-${words}`.toLowerCase().replace(/[^a-z0-9]+/g, "-");
  return `${plain.slice(0, 80)}.png`;
}
