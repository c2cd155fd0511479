// The page: asks the server what is new while someone looks, and hands it to the map, the charts and the header.

import { Refused, get, useKey, whenKeyIsAsked } from "./api.js";
import { Charts } from "./charts.js";
import { Chat } from "./chat.js";
import { Experts } from "./experts.js";
import { NOTHING, bandwidth, bytes, count, percent, text } from "./format.js";
import { ExpertMap } from "./map.js";

const EXPERTS_MS = 500;
const LIVE_MS = 1000;
const LONGEST_MS = 8000; // between two tries while the server is away
const SPEECH_MS = 20000; // a screen reader is not told more often than this

const $ = (id) => document.getElementById(id);

const experts = new Experts();
const map = new ExpertMap(experts, {
  frame: $("map-frame"), canvas: $("map"), tip: $("tip"), cursor: $("cursor"), axes: $("axes"), main: $("main"),
});
const charts = new Charts($("charts"));
new Chat({
  form: $("chat-form"), prompt: $("prompt"), log: $("log"), hint: $("chat-hint"), error: $("chat-error"), news: $("chat-news"),
  send: $("chat-send"), stop: $("chat-stop"), clear: $("chat-clear"), maxTokens: $("max-tokens"), temperature: $("temperature"),
});

let now = null; // the last answer of /v1/live
let spoken = 0;

async function askExperts() {
  const since = experts.snapshot === null ? "" : `?since=${experts.snapshot}`;
  const update = experts.take(await get(`v1/experts${since}`));
  $("map-empty").hidden = true;
  map.update(update);
}

async function askLive() {
  now = await get(`v1/live${charts.last_s ? `?since=${charts.last_s}` : ""}`);
  charts.update(now.samples);
  showTotals();
  speak();
}

function showTotals() {
  $("model").textContent = now.model;
  document.title = `${now.model} – finemoe`;
  $("policy").textContent = now.policy;
  $("policy").hidden = false;
  $("held").hidden = now.link_bandwidth_bytes_s === null;
  if (now.link_bandwidth_bytes_s !== null) $("held").textContent = `link held to ${text(bandwidth(now.link_bandwidth_bytes_s))}`;
  const size = `${text(bytes(now.expert_memory_bytes))} of ${text(bytes(now.expert_bytes))}`;
  $("memory-text").textContent = `${count(now.resident)} of ${count(now.experts)} in memory, ${size}`;
  $("memory-bar").style.width = `${(100 * now.resident) / now.experts}%`;
  const accesses = now.hits + now.late + now.misses;
  $("total-value").textContent = count(accesses);
  const [hit, late, miss] = $("shares").children;
  for (const [bar, id, value] of [[hit, "hits", now.hits], [late, "late", now.late], [miss, "misses", now.misses]]) {
    bar.style.flexGrow = value;
    $(`total-${id}`).textContent = accesses ? percent(value / accesses) : NOTHING;
  }
  $("total-precision").textContent = now.prefetched ? percent(now.prefetched_used / now.prefetched) : NOTHING;
}

// A summary in words, now and then.
function speak() {
  if (performance.now() - spoken < SPEECH_MS && spoken) return;
  const accesses = now.hits + now.late + now.misses;
  const last = (name) => now.samples[name].at(-1) ?? 0;
  const words = [
    `${count(now.resident)} of ${count(now.experts)} experts in memory.`,
    accesses ? `${percent(now.hits / accesses)} hits, ${percent(now.late / accesses)} late, ${percent(now.misses / accesses)} misses.` : "No accesses yet.",
    `${last("running")} requests running, ${last("waiting")} waiting.`,
    $("axes").textContent && `The map has ${$("axes").textContent}.`,
  ].join(" ");
  if (words === $("summary").textContent) return;
  spoken = performance.now();
  $("summary").textContent = words;
}

function show(state, words) {
  $("status").dataset.state = state;
  if ($("status-text").textContent !== words) $("status-text").textContent = words;
}

// Asks again and again, but not while the page is hidden; after a failure, ever more slowly.
function keepAsking(ask, every_ms) {
  let failures = 0;
  let timer = null;
  let asking = false;
  const again = async () => {
    clearTimeout(timer);
    if (document.hidden || asking) return;
    asking = true;
    try {
      await ask();
      failures = 0;
      show("live", "Live");
    } catch (error) {
      failures += 1;
      if (!(error instanceof Refused)) show("lost", "Server away, trying again");
      else if (error.status === 401) show("lost", "API key needed");
      else show("lost", error.message);
    }
    asking = false;
    timer = setTimeout(again, Math.min(LONGEST_MS, every_ms * 2 ** Math.min(failures, 6)));
  };
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      experts.snapshot = null; // what happened while nobody looked does not flash
      show("paused", "Paused");
    } else {
      again();
    }
  });
  again();
  return again;
}

whenKeyIsAsked(() => {
  if (!$("key-form").hidden) return;
  $("key-form").hidden = false;
  $("key").focus();
});

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  $("key").value = "";
  $("key-form").hidden = true;
  for (const again of loops) again();
});

for (const choice of document.querySelectorAll("input[name=view]")) {
  choice.addEventListener("change", () => {
    map.setView(choice.value);
    $("legend-place").hidden = choice.value !== "place";
    $("legend-scale").hidden = choice.value === "place";
    $("legend-scale").dataset.view = choice.value;
  });
}

const loops = [keepAsking(askExperts, EXPERTS_MS), keepAsking(askLive, LIVE_MS)];
