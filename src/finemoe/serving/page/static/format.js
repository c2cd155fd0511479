// Formats numbers for display.

const plain = new Intl.NumberFormat("en");

export const NOTHING = "–";

// A pair of number and unit, three significant digits.
export const rate = (value) => [digits(value), "tok/s"];
export const share = (value) => [(100 * value).toFixed(value > 0 && value < 0.0995 ? 1 : 0), "%"];

export function seconds(value) {
  return value < 1 ? [digits(1000 * value), "ms"] : [digits(value), "s"];
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return [unit ? digits(value) : Math.round(value), units[unit]];
}

export function bandwidth(value) {
  const [number, unit] = bytes(value);
  return [number, `${unit}/s`];
}

export const count = (value) => plain.format(value);
export const percent = (value) => share(value).join("");
export const text = (pair) => pair.join(" ");

export function plural(value, noun) {
  return `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
}

export function ago(seconds) {
  return seconds < 90 ? `${Math.round(seconds)} s ago` : `${Math.round(seconds / 60)} min ago`;
}

function digits(value) {
  if (value >= 100) return plain.format(Math.round(value));
  return value >= 10 ? value.toFixed(1) : value.toFixed(value ? 2 : 0);
}
