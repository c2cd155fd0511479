// The page: polls the server while it is visible, and updates the map, the charts and the header.

import { RequestError, get, onKeyRequired, useKey } from "./api.js";
import { Charts } from "./charts.js";
import { Chat } from "./chat.js";
import { Experts } from "./experts.js";
import { NOTHING, bandwidth, bytes, count, percent, text } from "./format.js";
import { ExpertMap } from "./map.js";

const EXPERTS_MS = 500;
const LIVE_MS = 1000;
const LONGEST_MS = 8000; // between two attempts while the server is unreachable
const ANNOUNCE_MS = 20000; // the shortest time between two announcements to a screen reader

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

let now = null; // the last response of /v1/live
let announced_ms = 0;

async function pollExperts() {
  const since = experts.snapshot === null ? "" : `?since=${experts.snapshot}`;
  const update = experts.apply(await get(`v1/experts${since}`));
  $("map-empty").hidden = true;
  map.update(update);
}

async function pollLive() {
  now = await get(`v1/live${charts.last_s ? `?since=${charts.last_s}` : ""}`);
  charts.update(now.samples);
  showTotals();
  announce();
}

function showTotals() {
  $("model").textContent = now.model;
  document.title = `${now.model} – finemoe`;
  $("policy").textContent = now.policy;
  $("policy").hidden = false;
  $("held").hidden = now.link_bandwidth_bytes_s === null;
  if (now.link_bandwidth_bytes_s !== null) $("held").textContent = `link limited to ${text(bandwidth(now.link_bandwidth_bytes_s))}`;
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

// A summary in text for screen readers, at intervals.
function announce() {
  if (performance.now() - announced_ms < ANNOUNCE_MS && announced_ms) return;
  const accesses = now.hits + now.late + now.misses;
  const last = (name) => now.samples[name].at(-1) ?? 0;
  const words = [
    `${count(now.resident)} of ${count(now.experts)} experts in memory.`,
    accesses ? `${percent(now.hits / accesses)} hits, ${percent(now.late / accesses)} late, ${percent(now.misses / accesses)} misses.` : "No accesses yet.",
    `${last("running")} requests running, ${last("waiting")} waiting.`,
    $("axes").textContent && `The map has ${$("axes").textContent}.`,
  ].join(" ");
  if (words === $("summary").textContent) return;
  announced_ms = performance.now();
  $("summary").textContent = words;
}

function show(state, words) {
  $("status").dataset.state = state;
  if ($("status-text").textContent !== words) $("status-text").textContent = words;
}

// Polls while the page is visible; backs off after failures.
function poll(request, every_ms) {
  let failures = 0;
  let timer = null;
  let pending = false;
  const again = async () => {
    clearTimeout(timer);
    if (document.hidden || pending) return;
    pending = true;
    try {
      await request();
      failures = 0;
      show("live", "Live");
    } catch (error) {
      failures += 1;
      if (!(error instanceof RequestError)) show("lost", "Server unreachable, retrying");
      else if (error.status === 401) show("lost", "API key needed");
      else show("lost", error.message);
    }
    pending = false;
    timer = setTimeout(again, Math.min(LONGEST_MS, every_ms * 2 ** Math.min(failures, 6)));
  };
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      experts.snapshot = null; // events while the page was hidden do not flash
      show("paused", "Paused");
    } else {
      again();
    }
  });
  again();
  return again;
}

onKeyRequired(() => {
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

const loops = [poll(pollExperts, EXPERTS_MS), poll(pollLive, LIVE_MS)];
