// Follows the swarm of a model. The first event has all machines, later ones those that have changed.

import { ask, events, failureOf } from "./api.js";
import { announce, at, make, setClass, setText } from "./dom.js";
import { Machines } from "./machines.js";
import { forgetWay, showWay } from "./way.js";

const MOST_EVENTS = 50;
let machines = new Machines();

function draw(swarm, isFirst) {
  showWay(swarm.way);
  machines.change(swarm, { isFirst });
  const { missing, num_blocks: numBlocks } = swarm, count = machines.count;
  setClass(at("health"), missing.length ? "bad" : "");
  setText(at("health"), missing.length
    ? `no machine has ${missing.length === 1 ? "block" : "blocks"} ${ranges(missing)}`
    : `${count} ${count === 1 ? "machine" : "machines"}, all ${numBlocks} blocks served`);
  setText(at("join"), swarm.join);
}

// 0, 1, 2, 7 as "0:3, 7:8"
function ranges(blocks) {
  const found = [];
  for (const block of blocks) {
    const last = found.at(-1);
    if (last?.[1] === block) last[1] += 1;
    else found.push([block, block + 1]);
  }
  return found.map(([start, end]) => `${start}:${end}`).join(", ");
}

let noted = "";

function note(event) {
  if (event.text === noted) return;
  noted = event.text;
  at("events").prepend(make("li", event.lost || event.bad ? "bad" : "", `${new Date().toLocaleTimeString()} ${event.text}`));
  while (at("events").children.length > MOST_EVENTS) at("events").lastElementChild.remove();
  if (event.loud) announce(event.text);
  if (event.replaced) machines.replaced(event.replaced, event.by);
}

let watching = null;

export async function watch(model) {
  watching?.abort();
  const mine = (watching = new AbortController());
  machines.clear();
  machines = new Machines();
  forgetWay();
  while (!mine.signal.aborted) {
    let isFirst = true, why = "the gateway does not answer";
    try {
      const answer = await ask(`api/swarm?model=${encodeURIComponent(model)}`, { signal: mine.signal });
      if (!answer.ok) why = await failureOf(answer);
      else for await (const event of events(answer)) {
        if (mine.signal.aborted) return;
        if (event.type !== "swarm") note(event);
        else { draw(event, isFirst); isFirst = false; }
      }
    } catch {
      if (mine.signal.aborted) return;
    }
    setText(at("health"), why);
    setClass(at("health"), "bad");
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}
