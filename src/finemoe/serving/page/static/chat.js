// A conversation with the model, streamed from /v1/chat/completions. Text is set as text, never as markup.

import { call, get } from "./api.js";
import { plural, seconds, text } from "./format.js";

export class Chat {
  constructor(parts) {
    Object.assign(this, parts);
    this.turns = []; // messages of the conversation, in the API's format
    this.running = null; // an AbortController
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    this.stop.addEventListener("click", () => this.running?.abort());
    this.clear.addEventListener("click", () => this.#clear());
  }

  async #send() {
    const content = this.prompt.value.trim();
    if (!content || this.running) return;
    this.running = new AbortController();
    this.#busy(true);
    this.hint.hidden = true;
    this.error.hidden = true;
    const asked = this.#turn("user", "You");
    asked.text.textContent = content;
    const answer = this.#turn("model", "Model");
    answer.turn.classList.add("busy");
    this.prompt.value = "";
    try {
      const timing = await this.#stream([...this.turns, { role: "user", content }], answer.text);
      this.#finish(answer, content, timing);
    } catch (error) {
      if (this.running.signal.aborted) {
        this.#finish(answer, content, "stopped");
      } else {
        if (!answer.text.textContent) answer.turn.remove();
        if (!answer.turn.isConnected) asked.turn.remove();
        if (!this.prompt.value) this.prompt.value = content; // keeps what was typed
        this.error.textContent = error instanceof TypeError ? "The server can't be reached. Is it still running?" : error.message;
        this.error.hidden = false;
      }
    } finally {
      answer.turn.classList.remove("busy");
      this.running = null;
      this.#busy(false);
    }
  }

  // Streams the answer into `into`. Returns its timing as text.
  async #stream(messages, into) {
    const begin = performance.now();
    this.model ??= (await get("v1/models")).data[0].id;
    const response = await call("v1/chat/completions", {
      signal: this.running.signal,
      body: {
        model: this.model,
        messages,
        stream: true,
        stream_options: { include_usage: true },
        max_tokens: this.maxTokens.valueAsNumber,
        temperature: this.temperature.valueAsNumber,
      },
    });
    let first = null;
    let usage = null;
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const piece = event.choices?.[0]?.delta?.content;
      if (!piece) continue;
      first ??= performance.now();
      const follow = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 48;
      into.append(piece);
      if (follow) this.log.scrollTop = this.log.scrollHeight;
    }
    const end = performance.now();
    if (first === null) return "no text";
    const parts = [`first after ${text(seconds((first - begin) / 1000))}`];
    const tokens = usage?.completion_tokens ?? 0;
    if (tokens) parts.unshift(plural(tokens, "token"));
    if (tokens > 1 && end > first) parts.push(`${((1000 * (tokens - 1)) / (end - first)).toFixed(1)} tok/s`);
    return parts.join(", ");
  }

  #finish(answer, content, timing) {
    this.turns.push({ role: "user", content }, { role: "assistant", content: answer.text.textContent });
    const note = document.createElement("p");
    note.className = "took";
    note.textContent = timing;
    answer.turn.append(note);
    this.log.scrollTop = this.log.scrollHeight;
    this.news.textContent = timing === "stopped" ? "Answer stopped." : `Answer complete: ${answer.text.textContent}`;
  }

  #turn(kind, name) {
    const turn = document.createElement("article");
    turn.className = `turn ${kind}`;
    const head = document.createElement("h3");
    head.textContent = name;
    const body = document.createElement("p");
    turn.append(head, body);
    this.log.append(turn);
    this.log.scrollTop = this.log.scrollHeight;
    return { turn, text: body };
  }

  #busy(busy) {
    this.send.hidden = busy;
    this.stop.hidden = !busy;
    this.clear.disabled = busy || !this.log.querySelector(".turn");
    if (busy) this.news.textContent = "The model is answering.";
    if (busy && document.activeElement === this.send) this.stop.focus();
    if (!busy && (document.activeElement === document.body || document.activeElement === this.stop)) this.prompt.focus();
  }

  #clear() {
    this.turns = [];
    for (const turn of this.log.querySelectorAll(".turn")) turn.remove();
    this.hint.hidden = false;
    this.error.hidden = true;
    this.clear.disabled = true;
    this.prompt.focus();
  }
}

// Yields the parsed events of a stream until [DONE] or its end.
async function* events(body) {
  let rest = "";
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
