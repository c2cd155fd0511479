// Requests to the page's own server, with the API key if there is one.

let key = "";
let keyRequired = () => {};

export class RequestError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Calls `handler` whenever the server answers 401.
export function onKeyRequired(handler) {
  keyRequired = handler;
}

export function useKey(text) {
  key = text;
}

// A response; throws `RequestError` with the server's message.
export async function call(path, { body, signal, timeout_s } = {}) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  const signals = [signal, timeout_s && AbortSignal.timeout(1000 * timeout_s)].filter(Boolean);
  const response = await fetch(path, {
    method: body ? "POST" : "GET",
    headers,
    body: body && JSON.stringify(body),
    cache: "no-store",
    signal: signals.length ? AbortSignal.any(signals) : undefined,
  });
  if (response.ok) return response;
  if (response.status === 401) keyRequired();
  const answer = await response.json().catch(() => ({}));
  throw new RequestError(response.status, answer.error?.message ?? `The server answered with status ${response.status}.`);
}

export async function get(path) {
  const response = await call(path, { timeout_s: 15 });
  return response.json();
}
