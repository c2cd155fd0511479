// What is known of every expert, kept up to date from answers of /v1/experts.

const COUNTS = ["hits", "late", "misses", "prefetched", "wasted"];

export const EVENTS = ["hit", "prefetch", "late", "miss"]; // of several at once, the last is shown

export class Experts {
  constructor() {
    this.snapshot = null;
    this.sizes = []; // experts of each layer
    this.width = 0; // experts of the largest layer; expert e of layer l has index l * width + e
    this.state = new Uint8Array(0);
    this.states = [];
  }

  get layers() {
    return this.sizes.length;
  }

  exists(layer, expert) {
    return layer >= 0 && layer < this.layers && expert >= 0 && expert < this.sizes[layer];
  }

  accesses(index) {
    return this.hits[index] + this.late[index] + this.misses[index];
  }

  // Takes an answer in. Returns whether the shape is new, the indices that changed, and pairs of index and event.
  take(answer) {
    const reshaped = String(answer.experts) !== String(this.sizes);
    if (reshaped) this.#shape(answer.experts);
    const first = answer.since === null;
    const changed = new Int32Array(answer.layer.length);
    const events = [];
    for (let row = 0; row < changed.length; row += 1) {
      const index = answer.layer[row] * this.width + answer.expert[row];
      changed[row] = index;
      this.state[index] = answer.state[row];
      for (const [event, name] of [[0, "hits"], [1, "prefetched"], [2, "late"], [3, "misses"]]) {
        if (!first && answer[name][row] > this[name][index]) events.push(index, event);
      }
      for (const name of COUNTS) this[name][index] = answer[name][row];
    }
    this.snapshot = answer.snapshot;
    this.states = answer.states;
    return { reshaped, changed, events };
  }

  #shape(sizes) {
    this.sizes = sizes;
    this.width = Math.max(...sizes);
    const size = sizes.length * this.width;
    this.state = new Uint8Array(size);
    for (const name of COUNTS) this[name] = new Float64Array(size);
  }
}
