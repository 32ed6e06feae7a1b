// The way that a token takes, and where its time is expected to go.

import { arrange, at, make, milliseconds, setText } from "./dom.js";

let way = null, isNow = false;

// Where the time of a token goes, in seconds; null before the first one.
export function expected() {
  if (!way || way.hops.some((hop) => hop.compute === null)) return null;
  const sum = (part) => way.hops.reduce((total, hop) => total + hop[part], 0);
  return { compute: sum("compute"), network: sum("network") + way.back, queue: sum("queue") };
}

// The place of a machine on the way, from 1; 0 if it is not on it now.
export const placeOf = (peer) => (isNow ? way.hops.findIndex((hop) => hop.peer === peer) + 1 : 0);

export function forgetWay() {
  way = null;
  showWay(null);
}

export function showWay(found) {
  isNow = found !== null;
  way = found ?? way;
  if (!way) {
    setText(at("route"), "No text has been generated yet. Write something, and watch its tokens go around.");
    at("times").replaceChildren();
    at("way").replaceChildren();
    return;
  }
  const parts = way.hops.flatMap((hop) => [
    { kind: "network", seconds: hop.network, text: "network" },
    ...(hop.queue ? [{ kind: "queue", seconds: hop.queue, text: "waits for others" }] : []),
    { kind: "compute", seconds: hop.compute ?? 0, text: `${hop.name} ${hop.start}:${hop.end}`, unknown: hop.compute === null },
  ]);
  parts.push({ kind: "network", seconds: way.back, text: "back" });
  const total = parts.reduce((sum, each) => sum + each.seconds, 0), sum = expected();
  const verb = isNow ? "takes" : "took";
  setText(at("route"), sum
    ? `From this gateway around and back, a token ${verb} about ${milliseconds(total)}: ${milliseconds(sum.compute)} of computing, ${milliseconds(sum.network)} of network${sum.queue ? `, ${milliseconds(sum.queue)} of waiting` : ""}.`
    : `From this gateway around and back, a token visits ${way.hops.length} machines.`);
  draw(at("times"), parts, "span", (element, part) => {
    const width = total ? `${((100 * part.seconds) / total).toFixed(2)}%` : "0%";
    if (element.style.width !== width) element.style.width = width;
    setText(element, "");
  });
  draw(at("way"), parts, "li", (element, part) => setText(element, `${part.text} ${part.unknown ? "not measured" : milliseconds(part.seconds)}`));
}

function draw(list, parts, tag, fill) {
  const children = [...list.children];
  arrange(list, parts.map((part, index) => {
    const element = children[index] ?? make(tag);
    if (element.className !== part.kind) element.className = part.kind;
    fill(element, part);
    return element;
  }));
}
