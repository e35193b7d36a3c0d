"use strict";
// Reads /status.json every 5 s and writes text into the page; no markup is ever made from what it reads.

const HOUR_S = 3600;
const byId = (id) => document.getElementById(id);

function size(n) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (n < 1024) return (unit === "B" ? n.toFixed(0) : n.toFixed(1)) + " " + unit;
    n /= 1024;
  }
  return n.toFixed(1) + " TiB";
}

function duration(s) {
  if (s < 1) return (s * 1000).toFixed(s < 0.01 ? 2 : 0) + " ms";
  if (s < 60) return s.toFixed(1) + " s";
  if (s < 3600) return Math.floor(s / 60) + " min " + Math.floor(s % 60) + " s";
  if (s < 86400) return Math.floor(s / 3600) + " h " + Math.floor((s % 3600) / 60) + " min";
  return Math.floor(s / 86400) + " d " + Math.floor((s % 86400) / 3600) + " h";
}

const count = (n) => Math.round(n).toLocaleString("en");
const percent = (n) => (100 * n).toFixed(1) + " %";

function row(body, cells) {
  const tr = document.createElement("tr");
  for (const cell of cells) {
    const td = document.createElement("td");
    if (cell instanceof Node) td.append(cell); else td.textContent = cell;
    tr.append(td);
  }
  body.append(tr);
}

function fill(body, rows, none) {
  body.replaceChildren();
  for (const cells of rows) row(body, cells);
  if (!rows.length) {
    row(body, [none]);
    body.firstChild.firstChild.className = "none";
    body.firstChild.firstChild.colSpan = 9;
  }
}

function numbers(values) {
  const shown = [
    ["hit ratio", percent(values.hit_ratio)],
    ["keys asked for", count(values.gets)],
    ["entries held", count(values.entries)],
    ["given out", size(values.hit_nbytes)],
    ["taken in", size(values.put_nbytes)],
    ["in flight", size(values.in_flight_nbytes)],
    ["corrupt records", count(values.cold_corrupt_total || 0)],
    ["up for", duration(values.uptime_s)],
  ];
  byId("numbers").replaceChildren(...shown.map(([name, text]) => {
    const pair = document.createElement("div");
    const dt = document.createElement("dt");
    const dd = document.createElement("dd");
    dt.textContent = name;
    dd.textContent = text;
    pair.append(dt, dd);
    return pair;
  }));
}

function tiers(found) {
  fill(byId("tiers"), Object.entries(found).map(([name, t]) => {
    const full = t.capacity_nbytes ? t.used_nbytes / t.capacity_nbytes : 0;
    const meter = document.createElement("meter");
    meter.value = full;
    meter.title = percent(full);
    return [name, meter, size(t.used_nbytes), size(t.capacity_nbytes), count(t.entries), count(t.hits),
            count(t.demotions), count(t.promotions), count(t.evictions)];
  }), "none");
}

function ratio(history) {
  const svg = byId("ratio");
  const make = (name, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  };
  const y = (value) => 135 - 130 * value;
  const lines = [0, 0.5, 1].map((value) => make("line", { x1: 0, x2: 720, y1: y(value), y2: y(value) }));
  let path = "";
  let pen = "M";
  for (const at of history) {
    if (at.hit_ratio === null) { pen = "M"; continue; }  // nothing was asked: a gap, not a zero
    const x = 720 * (1 - at.ago_s / HOUR_S);
    path += `${pen}${(x - 2).toFixed(1)} ${y(at.hit_ratio).toFixed(1)}L${x.toFixed(1)} ${y(at.hit_ratio).toFixed(1)}`;
    pen = "L";
  }
  svg.replaceChildren(...lines, make("path", { d: path }));
}

function accounts(kind, values, by) {
  const prefix = kind + "_nbytes_";
  const found = Object.keys(values).filter((name) => name.startsWith(prefix)).map((name) => name.slice(prefix.length));
  const of = (what, name) => values[`${kind}_${what}_${name}`] || 0;
  found.sort((a, b) => of(by, b) - of(by, a));
  fill(byId(kind + "s"), found.slice(0, 10).map((name) =>
    [name, count(of("hits", name)), count(of("entries", name)), size(of("nbytes", name))]), `no ${kind}s`);
}

async function refresh() {
  const state = byId("state");
  try {
    const reply = await fetch("/status.json", { signal: AbortSignal.timeout(4000) });
    const now = await reply.json();
    byId("version").textContent = now.version;
    numbers(now.values);
    tiers(now.tiers);
    ratio(now.history);
    accounts("tenant", now.values, "nbytes");
    accounts("namespace", now.values, "hits");
    fill(byId("calls"), now.calls.slice(0, 8).map((c) => [c.method, duration(c.mean_s), count(c.count)]), "no calls yet");
    const sick = now.values.cold_healthy === 0;
    state.textContent = sick ? "the disk fails: serving from memory" : "serving";
    state.className = sick ? "bad" : "";
    document.body.dataset.ready = "yes";
  } catch (error) {
    state.textContent = "no answer from the daemon";
    state.className = "bad";
  }
}

refresh();
setInterval(refresh, 5000);
