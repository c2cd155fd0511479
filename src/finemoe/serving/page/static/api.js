// Requests to the server that this page came from, with the API key where it asks for one.

let key = "";
let asked = () => {};

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// `then` is called whenever the server wants a key that it was not given.
export function whenKeyIsAsked(then) {
  asked = then;
}

export function useKey(text) {
  key = text;
}

// A response, or `Refused` with the server's own words.
export async function call(path, { body, signal, fallback_s } = {}) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  const signals = [signal, fallback_s && AbortSignal.timeout(1000 * fallback_s)].filter(Boolean);
  const response = await fetch(path, {
    method: body ? "POST" : "GET",
    headers,
    body: body && JSON.stringify(body),
    cache: "no-store",
    signal: signals.length ? AbortSignal.any(signals) : undefined,
  });
  if (response.ok) return response;
  if (response.status === 401) asked();
  const answer = await response.json().catch(() => ({}));
  throw new Refused(response.status, answer.error?.message ?? `The server answered with status ${response.status}.`);
}

export async function get(path) {
  const response = await call(path, { fallback_s: 15 });
  return response.json();
}
