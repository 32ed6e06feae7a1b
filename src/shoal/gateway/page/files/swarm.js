// The map: blocks across, machines down. A snapshot comes with every change.

import { ask, events } from "./api.js";

const at = (id) => document.getElementById(id);
const rows = new Map();
const LOST_SHOWN_MS = 20000;

function row(server) {
  const line = document.createElement("li");
  line.innerHTML = '<details><summary><span class="name"></span><span class="track"><span class="span"></span></span></summary><dl></dl></details>';
  const found = { line, name: line.querySelector(".name"), span: line.querySelector(".span"), facts: line.querySelector("dl"), lostAt: null, server };
  rows.set(server.peer, found);
  return found;
}

const seconds = (value) => (value === null ? "not measured" : `${(1000 * value).toFixed(1)} ms`);

function facts(server) {
  return [
    ["blocks", `${server.start} to ${server.end}`],
    ["state", server.state + (server.ready_in === null ? "" : `, ready in ${Math.max(0, server.ready_in).toFixed(0)} s`)],
    ["speed", server.speed === null ? "not measured" : `${server.speed.toFixed(1)} tokens/s for one`],
    ["cache left", `${server.room.toLocaleString("en")} tokens`],
    ["waiting there", String(server.queue)],
    ["sessions of this gateway", String(server.sessions)],
    ["round trip from here", seconds(server.round_trip)],
    ["links", server.links.map((each) => `${each.name} ${seconds(each.seconds)}`).join(", ") || "not measured"],
    ["computes in", server.quantization === "none" ? server.dtype : `${server.dtype}, ${server.quantization}`],
    ["peer", server.peer],
    ...(server.reason ? [["why there", server.reason]] : []),
  ];
}

function show(found, numBlocks) {
  const { server } = found;
  const state = found.lostAt === null ? server.state : "lost";
  found.line.className = `${state}${server.sessions && state !== "lost" ? " in-use" : ""}`;
  found.name.textContent = `${server.name || server.peer.slice(-8)} ${server.start}:${server.end}`;
  found.span.style.left = `${(100 * server.start) / numBlocks}%`;
  found.span.style.width = `${(100 * (server.end - server.start)) / numBlocks}%`;
  const told = found.lostAt === null ? facts(server) : [["state", "lost"], ...facts(server).slice(2)];
  found.facts.replaceChildren(...told.flatMap(([term, value]) => {
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = term;
    dd.textContent = value;
    return [dt, dd];
  }));
}

function draw(swarm) {
  const now = performance.now(), present = new Set(swarm.servers.map((each) => each.peer));
  for (const server of swarm.servers) {
    const found = rows.get(server.peer) ?? row(server);
    found.server = server;
    found.lostAt = server.lost ? (found.lostAt ?? now) : null;
  }
  for (const [peer, found] of rows) {
    if (!present.has(peer)) found.lostAt ??= now;
    if (found.lostAt !== null && now - found.lostAt > LOST_SHOWN_MS && !present.has(peer)) { found.line.remove(); rows.delete(peer); }
  }
  const sorted = [...rows.values()].sort((a, b) => a.server.start - b.server.start || a.server.end - b.server.end || (a.server.peer < b.server.peer ? -1 : 1));
  sorted.forEach((found, index) => {
    show(found, swarm.num_blocks);
    if (at("servers").children[index] !== found.line) at("servers").insertBefore(found.line, at("servers").children[index] ?? null);
  });
  at("scale").replaceChildren(...[0, swarm.num_blocks].map((each) => Object.assign(document.createElement("span"), { textContent: each })));
  at("health").className = swarm.missing.length ? "bad" : "";
  at("health").textContent = swarm.missing.length
    ? `blocks ${swarm.missing.join(", ")} have no server`
    : `${swarm.servers.length} ${swarm.servers.length === 1 ? "machine" : "machines"}, all ${swarm.num_blocks} blocks served`;
  at("route").textContent = swarm.route.length
    ? `A token's way now: this gateway → ${swarm.route.map((hop) => `${hop.name} ${hop.blocks}`).join(" → ")} → this gateway`
    : "No text is being generated through this gateway.";
  at("join").textContent = swarm.join;
}

function note(text) {
  const line = document.createElement("li");
  line.textContent = `${new Date().toLocaleTimeString()} ${text}`;
  at("events").prepend(line);
  while (at("events").children.length > 50) at("events").lastElementChild.remove();
}

let watching = null;

export async function watch(model) {
  watching?.abort();
  const mine = (watching = new AbortController());
  rows.clear();
  at("servers").replaceChildren();
  while (!mine.signal.aborted) {
    try {
      const answer = await ask(`api/swarm?model=${encodeURIComponent(model)}`, { signal: mine.signal });
      for await (const event of events(answer)) event.type === "swarm" ? draw(event) : note(event.text);
    } catch {
      if (mine.signal.aborted) return;
    }
    at("health").textContent = "the gateway does not answer";
    at("health").className = "bad";
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}
