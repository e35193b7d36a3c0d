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
  if (s === 0) return "0 s";
  if (s < 1) return (s * 1000).toFixed(s < 0.01 ? 2 : 0) + " ms";
  if (s < 60) return s.toFixed(1) + " s";
  if (s < 3600) return Math.floor(s / 60) + " min " + Math.floor(s % 60) + " s";
  if (s < 86400) return Math.floor(s / 3600) + " h " + Math.floor((s % 3600) / 60) + " min";
  return Math.floor(s / 86400) + " d " + Math.floor((s % 86400) / 3600) + " h";
}

const count = (n) => Math.round(n).toLocaleString("en");
const rate = (n) => n >= 100 ? count(n) : n >= 1 ? n.toFixed(1) : n > 0 ? n.toFixed(2) : "0";
const percent = (n) => (100 * n).toFixed(1) + " %";

function make(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

function row(body, cells, names) {
  const tr = make("tr");
  cells.forEach((cell, i) => {
    const td = make("td");
    if (cell instanceof Node) td.append(cell); else td.textContent = cell;
    if (names) td.dataset.name = names[i];
    tr.append(td);
  });
  body.append(tr);
}

function fill(body, rows, none, names) {
  body.replaceChildren();
  for (const cells of rows) row(body, cells, names);
  if (!rows.length) {
    row(body, [none]);
    body.firstChild.firstChild.className = "none";
    body.firstChild.firstChild.colSpan = 9;
  }
}

function pairs(id, shown) {
  byId(id).replaceChildren(...shown.map(([name, text, note]) => {
    const pair = make("div");
    const dd = make("dd", text);
    if (note) dd.append(make("small", note));
    pair.append(make("dt", name), dd);
    return pair;
  }));
}

const within = (history, s) => history.filter((at) => at.ago_s <= s);
const mean = (rows, name) => rows.length ? rows.reduce((sum, at) => sum + (at[name] || 0), 0) / rows.length : 0;

function recentRatio(rows, kind) {
  const asked = mean(rows, `lookup_${kind}_per_s`);
  return asked ? percent(Math.min(1, mean(rows, `lookup_hit_${kind}_per_s`) / asked)) : null;
}

function numbers(values, history) {
  const minute = within(history, 60);
  const kind = values.lookup_tokens ? "tokens" : "keys";
  const ratio = values.lookup_tokens ? values.token_hit_ratio : values.hit_ratio;
  const now = recentRatio(within(history, 300), kind);
  const saved = mean(within(history, HOUR_S), "prefill_saved_s_per_s");
  pairs("numbers", [
    ["prefill time saved", duration(values.prefill_saved_s || 0),
     values.prefill_saved_s ? `${rate(saved * HOUR_S)} s in an hour` : "no client has reported any"],
    [`hit ratio, of ${kind}`, percent(ratio || 0), now ? `${now} in five minutes` : "nothing looked up lately"],
    ["tokens found", count(values.lookup_hit_tokens || 0), `of ${count(values.lookup_tokens || 0)} looked up`],
    ["keys found", count(values.lookup_hit_keys || 0), `of ${count(values.lookup_keys || 0)} looked up`],
    ["entries held", count(values.entries || 0), `${count(values.evictions || 0)} evicted since start`],
    ["given out", size(values.hit_nbytes || 0), size(mean(minute, "hit_nbytes_per_s")) + " a second"],
    ["taken in", size(values.put_nbytes || 0), size(mean(minute, "put_nbytes_per_s")) + " a second"],
    ["up for", duration(values.uptime_s || 0), ""],
  ]);
}

function rates(values, history) {
  const minute = within(history, 60), hour = within(history, HOUR_S);
  const shown = [
    ["tokens looked up", "lookup_tokens", rate, count], ["tokens found", "lookup_hit_tokens", rate, count],
    ["keys looked up", "lookup_keys", rate, count], ["keys found", "lookup_hit_keys", rate, count],
    ["gets", "gets", rate, count], ["puts", "puts", rate, count],
    ["bytes out", "hit_nbytes", size, size], ["bytes in", "put_nbytes", size, size],
    ["evicted", "evictions", rate, count], ["expired", "expirations", rate, count],
  ];
  fill(byId("rates"), shown.map(([label, name, perSecond, total]) =>
    [label, perSecond(mean(minute, name + "_per_s")), perSecond(mean(hour, name + "_per_s")),
     total(values[name] || 0)]), "none");
}

const CAUSES = {
  absent: ["never put", "a new prompt, or gone too long ago to know"],
  expired: ["expired", "raise store.ttl_s"],
  evicted: ["evicted", "more room: warm first"],
  deleted: ["deleted", "a caller deleted it"],
  orphaned: ["orphaned", "the chunk before it left"],
  corrupt: ["damaged", "check the disk: kvstored verify"],
  lost: ["lost", "not written, or its codec or key file is not here"],
};

function misses(values, history) {
  const hour = within(history, HOUR_S);
  const seconds = hour.length * 10;
  fill(byId("misses"), Object.entries(CAUSES)
    .map(([cause, [label, help]]) => [cause, label, values["lookup_misses_" + cause] || 0, help])
    .filter(([cause, , n]) => n > 0 || cause === "absent" || cause === "expired" || cause === "evicted")
    .map(([cause, label, n, help]) =>
      [label, count(seconds * mean(hour, `lookup_misses_${cause}_per_s`)), count(n), help]), "none");
}

const TIERS = ["tier", "full", "used", "capacity", "entries", "hits", "demoted", "promoted", "evicted"];

function tiers(found) {
  fill(byId("tiers"), Object.entries(found).map(([name, t]) => {
    const full = t.capacity_nbytes ? t.used_nbytes / t.capacity_nbytes : 0;
    const meter = make("meter");
    meter.value = full;
    meter.title = percent(full);
    return [name, meter, size(t.used_nbytes), size(t.capacity_nbytes), count(t.entries), count(t.hits),
            count(t.demotions || 0), count(t.promotions || 0), count(t.evictions || 0)];
  }), "none", TIERS);
}

const y = (value) => 135 - 130 * Math.min(1, Math.max(0, value));

function graph(id, lines) {
  const svg = (name, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  };
  const grid = [0, 0.5, 1].map((value) => svg("line", { x1: 0, x2: 720, y1: y(value), y2: y(value) }));
  const drawn = lines.map(([name, points]) => {
    let path = "";
    let pen = "M";
    for (const [ago_s, value] of points) {
      if (value === null || value === undefined) { pen = "M"; continue; }  // nothing was asked: a gap, not a zero
      const x = 720 * (1 - ago_s / HOUR_S);
      path += `${pen}${(x - 2).toFixed(1)} ${y(value).toFixed(1)}L${x.toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
    }
    return svg("path", { d: path, class: name });
  });
  byId(id).replaceChildren(...grid, ...drawn);
}

function graphs(values, history, found) {
  const name = values.lookup_tokens ? "token_hit_ratio" : "hit_ratio";
  graph("ratio", [["ratio", history.map((at) => [at.ago_s, at[name]])]]);
  graph("fill", Object.entries(found).map(([tier, t]) => [tier, history.map((at) => {
    const used = at[tier + "_used_nbytes"];
    return [at.ago_s, used === undefined || !t.capacity_nbytes ? null : used / t.capacity_nbytes];
  })]));
  byId("fill-legend").replaceChildren(make("span", "1 hour ago"), ...Object.keys(found).map((tier) => {
    const full = found[tier].capacity_nbytes ? found[tier].used_nbytes / found[tier].capacity_nbytes : 0;
    return make("span", `${tier} ${percent(full)}`, tier);
  }), make("span", "now"));
}

function accounts(kind, values, by) {
  const prefix = kind + "_nbytes_";
  const found = Object.keys(values).filter((name) => name.startsWith(prefix)).map((name) => name.slice(prefix.length));
  const of = (what, name) => values[`${kind}_${what}_${name}`] || 0;
  found.sort((a, b) => of(by, b) - of(by, a));
  fill(byId(kind + "s"), found.slice(0, 10).map((name) =>
    [name, count(of("hits", name)), count(of("entries", name)), size(of("nbytes", name))]), `no ${kind}s`);
}

function disk(values) {
  if (values.cold_healthy === undefined) return pairs("disk", [["disk tier", "none"]]);
  pairs("disk", [
    ["writes", values.cold_healthy ? "succeed" : "fail"],
    ["waiting to be written", size(values.cold_pending_nbytes || 0)],
    ["taken on disk", size(values.cold_disk_nbytes || 0)],
    ["written since start", size(values.cold_bytes_written || 0)],
    ["errors writing, reading", `${count(values.cold_write_errors || 0)}, ${count(values.cold_read_errors || 0)}`],
    ["damaged records", count(values.cold_corrupt_total || 0)],
    ["not written (admission, budget)", count(values.cold_refusals || 0)],
  ]);
}

const BREAKER = ["asked", "tried again", "left alone: it does not answer"];

function byReason(values, prefix) {
  const found = Object.entries(values).filter(([name, n]) => name.startsWith(prefix) && n > 0);
  return found.map(([name, n]) => `${count(n)} ${name.slice(prefix.length)}`).join(", ") || "none";
}

function shared(values) {
  const events = values.block_events_published === undefined ? [] : [
    ["events for routers, dropped", `${count(values.block_events_published)}, ${count(values.block_events_dropped)}`],
  ];
  if (values.shared_lookups === undefined) return pairs("shared", [["shared with other hosts", "nothing"], ...events]);
  pairs("shared", [
    ["the shared store is", BREAKER[values.shared_breaker] || "?"],
    ["servers that answer", `${count(values.shared_nodes_up)} of ${count(values.shared_nodes)}`],
    ["chunks from it", `${count(values.shared_hits)}, ${size(values.shared_hit_nbytes)}`],
    ["asked, in vain", `${count(values.shared_lookups)}, ${count(values.shared_futile)}`],
    ["published", `${count(values.shared_published)}, ${size(values.shared_publish_nbytes)}`],
    ["wait to be published", `${size(values.shared_queue_nbytes)}, ${duration(values.shared_lag_s)} from put to there`],
    ["not published", byReason(values, "shared_dropped_")],
    ["not believed", count(values.shared_corrupt)],
    ["calls that failed", byReason(values, "shared_errors_")],
    ["deletions not acknowledged", count(values.shared_barred)],
    ...events,
  ]);
}

function clients(values) {
  pairs("clients", [
    ["connected through shared memory", count(values.lease_connections || 0)],
    ["leases held, entries in them", `${count(values.leases || 0)}, ${count(values.leased_entries || 0)}`],
    ["leases ended for their age", count(values.leases_aged || 0)],
    ["shared memory, in use", `${size(values.arena_nbytes || 0)}, ${size(values.arena_used_nbytes || 0)}`],
    ["lent for puts", size(values.ingest_nbytes || 0)],
    ["in flight, of at most", `${size(values.in_flight_nbytes || 0)}, ${size(values.in_flight_limit_nbytes || 0)}`],
    ["calls waiting, refused", `${count(values.calls_waiting || 0)}, ${count((values.in_flight_refused || 0) + (values.calls_refused || 0))}`],
  ]);
}

function flat(prefix, value) {
  if (value === null || typeof value !== "object" || Array.isArray(value)) return [[prefix, value]];
  return Object.entries(value).flatMap(([name, inner]) => flat(prefix ? `${prefix}.${name}` : name, inner));
}

function setup(now) {
  const store = now.config.store, memory = (tier) => size(store[tier].capacity_nbytes);
  pairs("setup", [
    ["listens at", now.addresses.listening.join(", ")],
    ["metrics and this page", now.addresses.metrics],
    ["data directory", now.paths.data_dir],
    ["budgets hot, warm, cold", now.paths.cold
      ? `${memory("hot")}, ${memory("warm")}, ${memory("cold")}` : `${memory("hot")}, ${memory("warm")}, no disk`],
    ["entries leave after", `${duration(store.ttl_s)} without a use`],
    ["eviction", store.policy],
  ]);
  fill(byId("config"), flat("", now.config).map(([name, value]) => [name, JSON.stringify(value)]), "none");
}

function alarms(found) {
  byId("alarms").replaceChildren(...found.map((alarm) => {
    const box = make("div", undefined, "alarm " + (alarm.severity === "critical" ? "critical" : "warning"));
    const what = make("p");
    what.append(make("strong", alarm.text), make("small", " " + alarm.name));
    box.append(what, make("p", alarm.do));
    return box;
  }));
}

async function refresh() {
  const state = byId("state");
  try {
    const reply = await fetch("/status.json", { signal: AbortSignal.timeout(4000) });
    const now = await reply.json();
    byId("version").textContent = now.version;
    alarms(now.alarms);
    numbers(now.values, now.history);
    rates(now.values, now.history);
    misses(now.values, now.history);
    tiers(now.tiers);
    graphs(now.values, now.history, now.tiers);
    disk(now.values);
    clients(now.values);
    shared(now.values);
    accounts("tenant", now.values, "nbytes");
    accounts("namespace", now.values, "hits");
    fill(byId("calls"), now.calls.slice(0, 8).map((c) =>
      [c.method, duration(c.p50_s), duration(c.p99_s), duration(c.mean_s), count(c.count)]), "no calls yet");
    setup(now);
    const sick = now.values.cold_healthy === 0;
    state.textContent = sick ? "the disk fails: serving from memory"
      : now.alarms.length ? `serving, ${now.alarms.length} alarm${now.alarms.length > 1 ? "s" : ""}` : "serving";
    state.className = sick || now.alarms.length ? "bad" : "";
    document.body.dataset.ready = "yes";
  } catch (error) {
    // The last numbers stay: they are what was true before.
    state.textContent = "no answer from the daemon";
    state.className = "bad";
  }
}

refresh();
setInterval(refresh, 5000);
