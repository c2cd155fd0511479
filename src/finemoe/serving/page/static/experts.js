// The state of every expert, updated from responses of /v1/experts.

const COUNTS = ["hits", "late", "misses", "prefetched", "wasted"];

export const EVENTS = ["hit", "prefetch", "late", "miss"]; // if several happen at once, the last one is shown

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

  // Applies a response. Returns whether the shape changed, the changed indices, and pairs of index and event.
  apply(response) {
    const reshaped = String(response.experts) !== String(this.sizes);
    if (reshaped) this.#shape(response.experts);
    const first = response.since === null;
    const changed = new Int32Array(response.layer.length);
    const events = [];
    for (let row = 0; row < changed.length; row += 1) {
      const index = response.layer[row] * this.width + response.expert[row];
      changed[row] = index;
      this.state[index] = response.state[row];
      for (const [event, name] of [[0, "hits"], [1, "prefetched"], [2, "late"], [3, "misses"]]) {
        if (!first && response[name][row] > this[name][index]) events.push(index, event);
      }
      for (const name of COUNTS) this[name][index] = response[name][row];
    }
    this.snapshot = response.snapshot;
    this.states = response.states;
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
