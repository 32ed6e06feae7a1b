// The map: blocks across, machines down. Many machines are shown as one row for each span, which opens.

import { arrange, at, make, milliseconds, setClass, setLabel, setSpan, setText } from "./dom.js";
import { placeOf } from "./way.js";

const MOST_SINGLE = 24; // more machines than these are shown by span
const MOST_GROUPS = 48; // more spans than these are shown by where they start,
const NUM_SLICES = 16; // in as many slices of the model
const GONE_SHOWN_MS = 20000;
const MOST_NUMBERED = 24; // blocks, in the row of holders
const number = (value) => value.toLocaleString("en", { maximumFractionDigits: 0 });
const measured = (seconds) => (seconds === null ? "not measured" : `${(1000 * seconds).toFixed(1)} ms`);
const order = (a, b) => a.start - b.start || a.end - b.end || (a.name < b.name ? -1 : a.name > b.name ? 1 : a.peer < b.peer ? -1 : 1);

export class Machines {
  #known = new Map(); // by peer: what it last said, since when it is gone, and what took over from it
  #rows = new Map();
  #open = new Set(); // spans whose machines are shown
  #numBlocks = 1;
  #later = null;

  get count() {
    return [...this.#known.values()].filter((each) => each.goneAt === null && !each.server.lost).length;
  }

  change(swarm, { isFirst }) {
    const now = performance.now();
    this.#numBlocks = swarm.num_blocks;
    const present = isFirst ? new Set(swarm.servers.map((each) => each.peer)) : null;
    for (const server of swarm.servers) {
      const known = this.#known.get(server.peer) ?? { replacedBy: null };
      if (!server.lost && server.state !== "leaving") known.replacedBy = null;
      this.#known.set(server.peer, Object.assign(known, { server, goneAt: null }));
    }
    const gone = isFirst ? [...this.#known.keys()].filter((peer) => !present.has(peer)) : swarm.gone;
    for (const peer of gone) {
      const known = this.#known.get(peer);
      if (known?.server.state === "leaving") this.#known.delete(peer);
      else if (known) known.goneAt ??= now;
    }
    this.#draw();
  }

  replaced(peer, by) {
    const known = this.#known.get(peer);
    if (!known || (known.goneAt === null && !known.server.lost && known.server.state !== "leaving")) return; // a better way
    known.replacedBy = by;
    this.#draw();
  }

  clear() {
    clearTimeout(this.#later);
    at("servers").replaceChildren();
  }

  #draw() {
    const now = performance.now();
    let soon = Infinity;
    for (const [peer, { goneAt }] of this.#known) {
      if (goneAt === null) continue;
      const left = goneAt + GONE_SHOWN_MS - now;
      if (left <= 0) this.#known.delete(peer);
      else soon = Math.min(soon, left);
    }
    clearTimeout(this.#later);
    if (soon < Infinity) this.#later = setTimeout(() => this.#draw(), soon + 1);
    const wanted = this.#wanted();
    const lines = wanted.map((row) => this.#shown(row));
    const keys = new Set(wanted.map((row) => row.key));
    for (const key of this.#rows.keys()) if (!keys.has(key)) this.#rows.delete(key);
    arrange(at("servers"), lines);
    setClass(at("servers"), lines.length > MOST_SINGLE ? "many" : "");
    this.#drawBlocks();
  }

  // The rows, from top to bottom.
  #wanted() {
    const all = [...this.#known.values()].map(described).sort(order);
    if (all.length <= MOST_SINGLE) return all;
    const singles = all.filter((each) => each.place || each.replacedBy || each.state === "lost").slice(0, MOST_SINGLE);
    const alone = new Set(singles), others = all.filter((each) => !alone.has(each));
    let groups = Map.groupBy(others, (each) => `${each.start}:${each.end} ${each.state}`);
    if (groups.size > MOST_GROUPS) {
      const slice = Math.ceil(this.#numBlocks / NUM_SLICES);
      groups = Map.groupBy(others, (each) => `slice ${Math.floor(each.start / slice)} ${each.state}`);
    }
    const rows = [...singles];
    for (const [key, members] of groups) {
      if (members.length === 1) { rows.push(members[0]); continue; }
      rows.push(together(key, members));
      if (this.#open.has(key)) rows.push(...members.map((each) => ({ ...each, isMember: true })));
    }
    return rows;
  }

  #shown(row) {
    const found = this.#rows.get(row.key) ?? this.#made(row);
    found.row = row;
    setClass(found.line, [row.state, row.sessions && "in-use", row.members && "group", row.isLoose && "loose", row.isMember && "member"].filter(Boolean).join(" "));
    setText(found.place, row.place ? String(row.place) : "");
    setText(found.name, row.members ? `${row.members} machines` : row.name);
    setText(found.blocks, `${row.start}:${row.end}`);
    setSpan(found.span, row.start, row.end, this.#numBlocks);
    const isOnline = row.state === "online";
    setText(found.speed, isOnline && row.speed !== null ? number(row.speed) : "");
    setText(found.room, isOnline ? number(row.room) : "");
    setText(found.queue, isOnline ? number(row.queue) : "");
    setText(found.state, isOnline ? "" : row.told);
    setLabel(found.summary, spoken(row));
    if (found.details.open && !row.members) fillFacts(found.facts, row.facts());
    return found.line;
  }

  #made(row) {
    const line = make("li"), details = make("details"), summary = make("summary"), facts = make("dl");
    const name = make("span", "name"), track = make("span", "track"), numbers = make("span", "numbers");
    const found = { row, line, details, summary, facts, place: make("b", "place"), name: make("span", "called"), blocks: make("span", "blocks") };
    found.span = make("span", "span");
    for (const each of ["speed", "room", "queue", "state"]) found[each] = make("span", each);
    name.append(found.place, found.name, found.blocks);
    track.append(found.span);
    numbers.append(found.speed, found.room, found.queue, found.state);
    summary.append(name, track, numbers);
    details.append(summary, facts);
    details.open = this.#open.has(row.key);
    line.append(details);
    details.addEventListener("toggle", () => {
      if (!found.row.members) { if (details.open) fillFacts(facts, found.row.facts()); return; }
      if (details.open === this.#open.has(row.key)) return;
      details.open ? this.#open.add(row.key) : this.#open.delete(row.key);
      this.#draw();
    });
    this.#rows.set(row.key, found);
    return found;
  }

  // For each block, how many machines hold it.
  #drawBlocks() {
    const counts = new Array(this.#numBlocks).fill(0);
    for (const { server, goneAt } of this.#known.values()) {
      if (goneAt !== null || server.lost || !server.usable || server.state !== "online") continue;
      for (let block = server.start; block < server.end; block += 1) counts[block] += 1;
    }
    const most = Math.max(...counts, 1), cells = [...at("holders").children];
    arrange(at("holders"), counts.map((count, block) => {
      const cell = cells[block] ?? make("span");
      setClass(cell, count ? `level-${Math.ceil((4 * count) / most)}` : "none");
      setText(cell, counts.length <= MOST_NUMBERED ? String(count) : "");
      return cell;
    }));
    const least = Math.min(...counts);
    setLabel(at("held"), `Each of the ${counts.length} blocks is held by ${least === most ? least : `${least} to ${most}`} ${most === 1 ? "machine" : "machines"}`);
    const step = [1, 2, 5, 10, 20, 50, 100].find((each) => counts.length <= 12 * each) ?? 1000;
    const marks = counts.map((_, block) => (block % step ? "" : String(block)));
    const shown = [...at("scale").children];
    arrange(at("scale"), marks.map((mark, index) => {
      const each = shown[index] ?? make("span");
      setText(each, mark);
      return each;
    }));
  }
}

function described({ server, goneAt, replacedBy }) {
  const state = server.lost ? "lost" : goneAt !== null ? "gone" : server.usable ? server.state : "unused";
  const told = state === "unused" ? "has other weights, or is excluded" : state === "joining" && server.ready_in !== null ? `joining, ${Math.max(0, server.ready_in)} s` : state;
  return {
    ...server, key: server.peer, state, replacedBy,
    sessions: state === "online" || state === "leaving" ? server.sessions : 0,
    place: placeOf(server.peer),
    told: replacedBy ? `${told} → ${replacedBy.join(", ")}` : told,
    facts: () => factsOf(server, state),
  };
}

function together(key, members) {
  const sum = (part) => members.reduce((total, each) => total + each[part], 0);
  const known = members.filter((each) => each.speed !== null);
  const start = Math.min(...members.map((each) => each.start)), end = Math.max(...members.map((each) => each.end));
  return {
    ...members[0], start, end, isLoose: members.some((each) => each.start !== start || each.end !== end),
    key, members: members.length, name: "", peer: key, place: 0,
    speed: known.length ? known.reduce((total, each) => total + each.speed, 0) / known.length : null,
    room: sum("room"), queue: sum("queue"), sessions: sum("sessions"),
  };
}

function spoken(row) {
  const parts = [row.members ? `${row.members} machines` : row.name, `${row.isLoose ? "within " : ""}blocks ${row.start} to ${row.end}`, row.told.replace(" →", ", replaced by")];
  if (row.sessions) parts.push("in use");
  if (row.place) parts.push(`number ${row.place} on a token's way`);
  if (row.state === "online") {
    if (row.speed !== null) parts.push(`${number(row.speed)} tokens/s${row.members ? " each" : ""}`);
    parts.push(`room for ${number(row.room)} tokens`, `${number(row.queue)} waiting`);
  }
  return parts.join(", ");
}

function factsOf(server, state) {
  const since = [
    ["speed", server.speed === null ? "not measured" : `${server.speed.toFixed(1)} tokens/s for one text`],
    ["room in the cache", `${number(server.room)} tokens`],
    ["waiting there", String(server.queue)],
    ["texts of this gateway", String(server.sessions)],
    ["round trip from here", measured(server.round_trip)],
    ["links", server.links.map((each) => `${each.name} ${measured(each.seconds)}`).join(", ") || "not measured"],
  ];
  return [
    ["blocks", `${server.start}:${server.end}`],
    ["state", state + (state === "joining" && server.ready_in !== null ? `, ready in ${Math.max(0, server.ready_in)} s` : "")],
    ...(state === "lost" || state === "gone" ? [] : since),
    ["computes in", server.quantization === "none" ? server.dtype : `${server.dtype}, ${server.quantization}`],
    ...(server.reason ? [["why these blocks", server.reason]] : []),
    ["peer", server.peer],
  ];
}

function fillFacts(list, facts) {
  const children = [...list.children];
  arrange(list, facts.flatMap(([term, value], index) => {
    const dt = children[2 * index] ?? make("dt"), dd = children[2 * index + 1] ?? make("dd");
    setText(dt, term);
    setText(dd, value);
    return [dt, dd];
  }));
}
