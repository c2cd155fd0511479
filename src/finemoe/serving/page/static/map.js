// The map: one cell per expert, on a canvas. Only changed cells are drawn, so that ten thousand cells are cheap.

import { EVENTS } from "./experts.js";
import { count, plural } from "./format.js";

const PLACES = ["absent", "flight", "resident", "use"];
const FADE_MS = 1100;
const FRAME_MS = 33;
const SIZES = [0.5, 0.68, 1, 1]; // share of a large cell that is filled, by state
const NAMES = { absent: "on disk", "in flight": "in flight", resident: "in memory", "in use": "in use" };

export class ExpertMap {
  constructor(experts, { frame, canvas, tip, cursor, axes, main }) {
    Object.assign(this, { experts, frame, canvas, tip, cursorText: cursor, axes, main });
    this.context = canvas.getContext("2d", { alpha: false });
    this.view = "place";
    this.most = 1;
    this.flashes = new Map(); // index -> [event, start in ms]
    this.at = null; // the cursor: [layer, expert]
    this.reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
    new ResizeObserver(() => this.layOut()).observe(frame);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.layOut());
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerleave", () => this.#move(null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && this.#move(this.at ?? [0, 0], true));
    canvas.addEventListener("blur", () => this.#move(null));
  }

  setView(view) {
    this.view = view;
    this.layOut();
  }

  update({ reshaped, changed, events }) {
    const now = performance.now();
    if (this.reducedMotion.matches) this.#clearFlashes();
    for (let i = 0; i < events.length; i += 2) this.flashes.set(events[i], [events[i + 1], now]);
    const rescaled = this.view !== "place" && this.#measure();
    if (reshaped || rescaled) this.layOut();
    else for (const index of changed) this.#cell(index);
    if (this.flashes.size) this.#animate();
    if (this.at) this.#showTip();
  }

  // Sizes the canvas for the model and the available width, and draws everything.
  layOut() {
    const { experts, frame, canvas, context } = this;
    const { layers, width } = experts;
    if (!layers) return;
    this.main.toggleAttribute("data-wide", Math.max(layers, width) > 72);
    const ratio = window.devicePixelRatio || 1;
    const room = frame.clientWidth;
    this.left = Math.round(30 * ratio);
    this.top = Math.round(20 * ratio);
    const free = room * ratio - this.left;
    const long = Math.max(layers, width);
    const flat = free / long >= 2.5 * ratio; // the longer side is horizontal if its cells are wide enough then
    this.across = flat === layers >= width ? "layer" : "expert";
    [this.columns, this.rows] = this.across === "layer" ? [layers, width] : [width, layers];
    this.w = Math.max(1, Math.min(Math.floor(free / this.columns), Math.round(40 * ratio)));
    const tall = Math.max(this.w, Math.min(18 * ratio, (300 * ratio) / this.rows)); // narrow cells are taller
    this.h = Math.max(Math.ceil(2 * ratio), Math.floor(Math.min(tall, 30 * ratio, (640 * ratio) / this.rows)));
    this.gap = Math.min(this.w, this.h) >= 5 * ratio ? Math.max(1, Math.round(Math.min(this.w, this.h) * 0.12)) : 0;
    canvas.width = Math.ceil(this.left + this.columns * this.w);
    canvas.height = Math.ceil(this.top + this.rows * this.h);
    canvas.style.width = `${canvas.width / ratio}px`;
    canvas.style.height = `${canvas.height / ratio}px`;
    this.#readColours();
    this.#measure();
    context.fillStyle = this.colours.card;
    context.fillRect(0, 0, canvas.width, canvas.height);
    this.#labels(ratio);
    for (let layer = 0; layer < layers; layer += 1) {
      for (let expert = 0; expert < experts.sizes[layer]; expert += 1) this.#cell(layer * width + expert);
    }
  }

  #readColours() {
    const style = getComputedStyle(document.documentElement);
    const named = [...PLACES, ...EVENTS, "card", "soft", "ink"];
    this.colours = Object.fromEntries(named.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  }

  // Updates the largest count of the view. Returns whether it changed enough to redraw everything.
  #measure() {
    if (this.view === "place") return false;
    let most = 1;
    for (let index = 0; index < this.experts.state.length; index += 1) most = Math.max(most, this.#amount(index));
    const rescaled = most > 1.05 * this.most || most < 0.95 * this.most;
    if (rescaled) this.most = most;
    return rescaled;
  }

  #amount(index) {
    return this.view === "misses" ? this.experts.misses[index] : this.experts.accesses(index);
  }

  #corner(index) {
    const layer = Math.floor(index / this.experts.width);
    const expert = index % this.experts.width;
    const [column, row] = this.across === "layer" ? [layer, expert] : [expert, layer];
    return [this.left + column * this.w, this.top + row * this.h];
  }

  #cell(index, now = performance.now()) {
    const { context, colours } = this;
    const [x, y] = this.#corner(index);
    const w = this.w - this.gap;
    const h = this.h - this.gap;
    context.fillStyle = colours.card;
    context.fillRect(x, y, this.w, this.h);
    if (this.view === "place") {
      const state = this.experts.state[index];
      const size = this.gap > 1 ? SIZES[state] : 1;
      context.fillStyle = colours[PLACES[state]];
      this.#box(x, y, w, h, size);
    } else {
      context.fillStyle = colours.absent;
      this.#box(x, y, w, h, 1);
      context.globalAlpha = Math.sqrt(this.#amount(index) / this.most);
      context.fillStyle = this.view === "misses" ? colours.miss : colours.use;
      this.#box(x, y, w, h, 1);
      context.globalAlpha = 1;
    }
    const flash = this.flashes.get(index);
    if (flash) {
      context.globalAlpha = this.reducedMotion.matches ? 1 : Math.max(0, 1 - (now - flash[1]) / FADE_MS) ** 0.8;
      context.fillStyle = colours[EVENTS[flash[0]]];
      if (this.gap) this.#frame(x, y, w, h);
      else this.#box(x, y, w, h, 1);
      context.globalAlpha = 1;
    }
    if (this.at && index === this.at[0] * this.experts.width + this.at[1]) this.#ring();
  }

  #box(x, y, w, h, size) {
    const dx = Math.round((w * (1 - size)) / 2);
    const dy = Math.round((h * (1 - size)) / 2);
    const radius = Math.min(w, h) * 0.18;
    if (radius < 2) {
      this.context.fillRect(x + dx, y + dy, w - 2 * dx, h - 2 * dy);
      return;
    }
    this.context.beginPath();
    this.context.roundRect(x + dx, y + dy, w - 2 * dx, h - 2 * dy, radius * size);
    this.context.fill();
  }

  // In a large cell a flash is a frame, so that its state stays visible.
  #frame(x, y, w, h) {
    const line = Math.max(2, Math.round(Math.min(w, h) * 0.16));
    this.context.beginPath();
    this.context.roundRect(x, y, w, h, Math.min(w, h) * 0.18);
    this.context.roundRect(x + line, y + line, w - 2 * line, h - 2 * line, Math.min(w, h) * 0.08);
    this.context.fill("evenodd");
  }

  // With reduced motion, a flash stays until the next response.
  #clearFlashes() {
    const gone = [...this.flashes.keys()];
    this.flashes.clear();
    for (const index of gone) this.#cell(index);
  }

  #animate() {
    if (this.reducedMotion.matches) {
      for (const index of this.flashes.keys()) this.#cell(index);
      return;
    }
    if (this.frameRequested) return;
    this.frameRequested = true;
    let drawn = 0;
    const step = (now) => {
      if (now - drawn >= FRAME_MS) {
        drawn = now;
        for (const [index, [, since]] of this.flashes) {
          if (now - since >= FADE_MS) this.flashes.delete(index);
          this.#cell(index, now);
        }
      }
      this.frameRequested = this.flashes.size > 0;
      if (this.frameRequested) requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  #labels(ratio) {
    const { context, colours, columns, rows } = this;
    context.fillStyle = colours.soft;
    context.font = `${11.5 * ratio}px system-ui, sans-serif`;
    context.textBaseline = "middle";
    context.textAlign = "center";
    const every = step(30 * ratio, this.w);
    for (let column = 0; column < columns; column += every) {
      context.fillText(column, this.left + (column + 0.5) * this.w - this.gap / 2, this.top - 8 * ratio);
    }
    context.textAlign = "right";
    const each = step(16 * ratio, this.h);
    for (let row = 0; row < rows; row += each) {
      context.fillText(row, this.left - 6 * ratio, this.top + (row + 0.5) * this.h - this.gap / 2);
    }
    const [across, down] = this.across === "layer" ? ["layers", "experts"] : ["experts", "layers"];
    this.axes.textContent = `${across} across, ${down} down`;
  }

  #point(event) {
    const box = this.canvas.getBoundingClientRect();
    const ratio = this.canvas.width / box.width;
    const column = Math.floor(((event.clientX - box.left) * ratio - this.left) / this.w);
    const row = Math.floor(((event.clientY - box.top) * ratio - this.top) / this.h);
    const place = this.across === "layer" ? [column, row] : [row, column];
    this.#move(this.experts.exists(...place) ? place : null);
  }

  #key(event) {
    const [across, down] = this.across === "layer" ? [[1, 0], [0, 1]] : [[0, 1], [1, 0]];
    const steps = {
      ArrowRight: across, ArrowLeft: across.map((n) => -n), ArrowDown: down, ArrowUp: down.map((n) => -n),
      PageDown: [10, 0], PageUp: [-10, 0], Home: [0, -Infinity], End: [0, Infinity],
    };
    if (event.key === "Escape") this.#move(null);
    const move = steps[event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey || !this.experts.layers) return;
    event.preventDefault();
    const from = this.at ?? [0, 0];
    const layer = Math.min(Math.max(from[0] + move[0], 0), this.experts.layers - 1);
    const expert = Math.min(Math.max(from[1] + move[1], 0), this.experts.sizes[layer] - 1);
    this.#move([layer, expert], true);
  }

  #move(place, spoken = false) {
    if (!this.experts.layers) return;
    const before = this.at;
    this.at = place;
    if (before) this.#around(before);
    if (!place) {
      this.tip.hidden = true;
      return;
    }
    this.#ring();
    this.#showTip();
    if (spoken) this.cursorText.textContent = this.describe(...place).join(", ");
  }

  // The ring overlaps the neighbours: they are redrawn when it is removed.
  #around([layer, expert]) {
    for (const l of [layer - 1, layer, layer + 1]) {
      for (const e of [expert - 1, expert, expert + 1]) {
        if (this.experts.exists(l, e)) this.#cell(l * this.experts.width + e);
      }
    }
  }

  #ring() {
    const [x, y] = this.#corner(this.at[0] * this.experts.width + this.at[1]);
    const line = Math.max(2, this.gap);
    this.context.strokeStyle = this.colours.ink;
    this.context.lineWidth = line;
    this.context.strokeRect(x - line / 2 + 1, y - line / 2 + 1, this.w - this.gap + line - 2, this.h - this.gap + line - 2);
  }

  describe(layer, expert) {
    const { experts } = this;
    const index = layer * experts.width + expert;
    return [
      `Layer ${layer}, expert ${expert}`,
      NAMES[experts.states[experts.state[index]]],
      `${plural(experts.hits[index], "hit")}, ${count(experts.late[index])} late, ${count(experts.misses[index])} missed`,
      `${plural(experts.prefetched[index], "prefetch").replace("prefetchs", "prefetches")}, ${count(experts.wasted[index])} wasted`,
    ];
  }

  #showTip() {
    const [title, ...lines] = this.describe(...this.at);
    const head = document.createElement("b");
    head.textContent = title;
    this.tip.replaceChildren(head, `\n${lines.join("\n")}`);
    this.tip.hidden = false;
    const ratio = this.canvas.width / this.canvas.getBoundingClientRect().width;
    const [x, y] = this.#corner(this.at[0] * this.experts.width + this.at[1]).map((n) => n / ratio);
    const right = x + this.w / ratio + 10;
    const fits = right + this.tip.offsetWidth <= this.frame.clientWidth;
    this.tip.style.left = `${fits ? right : Math.max(0, x - this.tip.offsetWidth - 10)}px`;
    this.tip.style.top = `${Math.max(0, y - 8)}px`;
  }
}

// Number of cells between labels, so that each label has `room` pixels.
function step(room, cell) {
  for (const every of [1, 2, 4, 5, 8, 10, 16, 20, 32, 64]) if (every * cell >= room) return every;
  return 128;
}
