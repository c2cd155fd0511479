// Small charts of the last ten minutes, as SVG.

import { NOTHING, ago, bandwidth, count, rate, seconds, share, text } from "./format.js";

const WIDTH = 300;
const HEIGHT = 72;
const KEPT_S = 600;
const SHORTEST_S = 60; // time span of the charts right after start

const CHARTS = [
  { name: "tok_s", title: "Tokens per second", form: rate, area: true },
  { name: "ttft_s", title: "Time to first token", form: seconds, sparse: true },
  { name: "tpot_s", title: "Time per token", form: seconds, sparse: true },
  { name: "hit_rate", title: "Hit rate", form: share, top: 1, sparse: true, hue: "hit" },
  { name: "bytes_s", title: "Experts read", form: bandwidth, base: 1024, area: true },
  { name: "stall_share", title: "Waiting for experts", form: share, top: 1, area: true, hue: "miss" },
  { name: "running", second: "waiting", title: "Requests", form: (value) => [count(value), "running"], area: true },
];

export class Charts {
  constructor(parent) {
    this.columns = {};
    this.charts = CHARTS.map((chart) => new Chart(chart, parent));
  }

  get last_s() {
    return this.columns.time_s?.at(-1) ?? 0;
  }

  // Adds new samples, drops those older than ten minutes, and draws.
  update(samples) {
    const times = [...(this.columns.time_s ?? []), ...samples.time_s];
    const from = times.findIndex((time) => time > (times.at(-1) ?? 0) - KEPT_S);
    for (const name of Object.keys(samples)) {
      this.columns[name] = [...(this.columns[name] ?? []), ...samples[name]].slice(Math.max(0, from));
    }
    for (const chart of this.charts) chart.draw(this.columns);
  }

  clear() {
    this.columns = {};
  }
}

class Chart {
  constructor(options, parent) {
    Object.assign(this, options);
    this.at = null; // index of the sample under the pointer
    this.card = parent.appendChild(element("article", `card chart ${this.hue ?? ""}`));
    this.heading = this.card.appendChild(element("h2"));
    this.heading.textContent = this.title;
    this.value = this.card.appendChild(element("p", "value"));
    this.svg = this.card.appendChild(shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" }));
    for (const y of [0.5, HEIGHT / 2, HEIGHT - 0.5]) {
      this.svg.appendChild(shape("line", { class: "grid", x1: 0, x2: WIDTH, y1: y, y2: y }));
    }
    this.fill = this.svg.appendChild(shape("path", { class: "area" }));
    this.line = this.svg.appendChild(shape("path", { class: "line" }));
    this.other = this.svg.appendChild(shape("path", { class: "line second" }));
    this.mark = this.svg.appendChild(shape("line", { class: "mark", y1: 0, y2: HEIGHT, visibility: "hidden" }));
    const ends = this.card.appendChild(element("p", "ends"));
    this.begin = ends.appendChild(element("span"));
    this.peak = ends.appendChild(element("span"));
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
    this.svg.addEventListener("pointerleave", () => this.#point(null));
  }

  draw(columns) {
    this.columns = columns;
    const times = columns.time_s;
    const values = columns[this.name];
    const others = this.second ? columns[this.second] : [];
    const end = times.at(-1) ?? 0;
    const span = Math.min(KEPT_S, Math.max(SHORTEST_S, end - (times[0] ?? 0)));
    const most = [...values, ...others].reduce((top, value) => Math.max(top, value ?? 0), 0);
    const top = this.top ?? ceiling(most, this.base);
    this.x = (time) => WIDTH * (1 - (end - time) / span);
    const y = (value) => HEIGHT - 1 - (HEIGHT - 2) * (value / top);
    const line = path(times, values, this.x, y, this.sparse);
    this.line.setAttribute("d", line);
    const started = times.length ? this.x(times[0]).toFixed(1) : 0;
    this.fill.setAttribute("d", this.area && line ? `${line}L${WIDTH} ${HEIGHT}L${started} ${HEIGHT}Z` : "");
    this.other.setAttribute("d", this.second ? path(times, others, this.x, y) : "");
    this.begin.textContent = ago(span);
    this.peak.textContent = this.top ? "0 to 100%" : most ? `top ${text(this.form(top)).replace(/\.0+(?= )/, "")}` : "";
    const known = values.filter((value) => value !== null);
    const spread = known.length ? `, between ${text(this.form(Math.min(...known)))} and ${text(this.form(Math.max(...known)))}` : "";
    this.svg.setAttribute("aria-label", `${this.title} over the last ${Math.round(span / 60)} minutes${spread}`);
    this.#show();
  }

  #show() {
    const { columns, at } = this;
    const times = columns.time_s;
    const values = columns[this.name];
    let shown = at ?? values.length - 1;
    if (at === null && this.sparse) while (shown >= 0 && values[shown] === null) shown -= 1;
    const value = values[shown] ?? null;
    const [number, unit] = value === null ? [NOTHING, ""] : this.form(value);
    const small = element("small");
    small.textContent = this.second && value !== null ? `running, ${count(columns[this.second][shown])} waiting` : unit;
    this.value.replaceChildren(String(number), small);
    this.heading.textContent = at === null ? this.title : `${this.title}, ${ago(times.at(-1) - times[at])}`;
    this.mark.setAttribute("visibility", at === null ? "hidden" : "visible");
    if (at !== null) for (const end of ["x1", "x2"]) this.mark.setAttribute(end, this.x(times[at]));
  }

  #point(event) {
    const times = this.columns?.time_s ?? [];
    this.at = null;
    if (event && times.length) {
      const box = this.svg.getBoundingClientRect();
      const x = (WIDTH * (event.clientX - box.left)) / box.width;
      const far = times.map((time) => Math.abs(this.x(time) - x));
      this.at = far.indexOf(Math.min(...far));
    }
    if (this.columns) this.#show();
  }
}

// The path of a chart. Sparse values are connected across gaps, others are not.
function path(times, values, x, y, sparse = false) {
  let d = "";
  let drawing = false;
  for (let i = 0; i < times.length; i += 1) {
    if (values[i] === null || values[i] === undefined) {
      drawing &&= sparse;
      continue;
    }
    const point = `${x(times[i]).toFixed(1)} ${y(values[i]).toFixed(1)}`;
    d += drawing ? `L${point}` : `M${point}l0.01 0`;
    drawing = true;
  }
  return d;
}

// The next round number: 1, 2 or 5 times a power of ten, of bytes in binary units.
function ceiling(value, base = 1) {
  if (!(value > 0)) return 1;
  if (base > 1) {
    const unit = base ** Math.floor(Math.log(value) / Math.log(base));
    return unit * ceiling(value / unit);
  }
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => step * power >= value);
}

function element(name, kind = "") {
  const made = document.createElement(name);
  if (kind) made.className = kind.trim();
  return made;
}

function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
