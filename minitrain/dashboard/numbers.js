"use strict";
/* Numbers of the page: out of their base64, averaged, looked up, thinned. Pure functions; page.js shows what they find. */

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
const unpackSteps = (told) =>
  told.i4 === undefined ? Int32Array.from({ length: told.n }, (_, i) => told.first + told.by * i) : new Int32Array(bytes(told.i4));

function unpack(lines) {
  const byName = new Map();
  for (const line of lines) {
    if (!line.mean_of) {
      line.at = unpackSteps(line.steps);
      line.value = new Float32Array(bytes(line.f4));
      if (line.spread) line.spread = new Float32Array(bytes(line.spread));
    }
    byName.set(line.name, line);
  }
  for (const line of lines) if (line.mean_of) line.source = byName.get(line.mean_of);
  return lines;
}

/* The mean of what is finite in the window around each value, narrower at the ends: as report.log has it. */
function runningMean(source, window) {
  const n = source.value.length, half = Math.floor(window / 2), total = new Float64Array(n + 1), known = new Int32Array(n + 1);
  source.value.forEach((x, i) => {
    const finite = Number.isFinite(x);
    total[i + 1] = total[i] + (finite ? x : 0);
    known[i + 1] = known[i] + (finite ? 1 : 0);
  });
  return Float32Array.from({ length: n }, (_, i) => {
    const reach = Math.min(half, i), a = i - reach, b = Math.min(n, i + reach + 1);
    return Number.isFinite(source.value[i]) ? (total[b] - total[a]) / (known[b] - known[a]) : NaN;
  });
}

/* The first index whose step is at least this one. */
function indexOf(steps, step) {
  let a = 0, b = steps.length;
  while (a < b) {
    const middle = (a + b) >> 1;
    if (steps[middle] < step) a = middle + 1; else b = middle;
  }
  return a;
}

/* Indices that draw the same curve: of each bucket the lowest, the highest and the first that is not finite. */
function extremes(value, from, to, buckets) {
  const n = to - from, kept = [];
  if (n <= 2 * buckets) {
    for (let i = from; i < to; i++) kept.push(i);
    return kept;
  }
  for (let bucket = 0; bucket < buckets; bucket++) {
    const a = from + Math.floor((bucket * n) / buckets), b = from + Math.floor(((bucket + 1) * n) / buckets);
    let low = -1, high = -1, gap = -1;
    for (let i = a; i < b; i++) {
      if (!Number.isFinite(value[i])) { if (gap < 0) gap = i; continue; }
      if (low < 0 || value[i] < value[low]) low = i;
      if (high < 0 || value[i] > value[high]) high = i;
    }
    kept.push(...[...new Set([low, high, gap])].filter((i) => i >= 0).sort((x, y) => x - y));
  }
  return kept;
}

/* The index of the step that is nearest. */
function nearest(steps, step) {
  const i = indexOf(steps, step);
  return i > 0 && (i === steps.length || step - steps[i - 1] <= steps[i] - step) ? i - 1 : i;
}

/* A number as a person reads it. */
function show(x) {
  if (x === null || x === undefined) return "–";
  if (!Number.isFinite(x)) return Number.isNaN(x) ? "not finite" : "infinite";
  return x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e6) ? x.toExponential(3) : String(+x.toPrecision(5));
}

/* What lines hold between two steps, a line of text for each step and series. */
function csv(lines, lo, hi) {
  const text = ["step,series,value"];
  for (const line of lines) {
    const name = `"${line.name.replaceAll('"', '""')}"`;
    line.at.forEach((step, i) => { if (step >= lo && step <= hi) text.push(`${step},${name},${line.value[i]}`); });
  }
  return `${text.join("\n")}\n`;
}

/* Put a text into the clipboard; the old way where the page may not, as from disk in some browsers. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/* Save a text as a file. */
function download(name, text, type) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
