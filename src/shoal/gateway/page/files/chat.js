// A conversation with one of the models.

import { ask, events, failureOf } from "./api.js";
import { announce, at, copy, make, milliseconds } from "./dom.js";
import { expected } from "./way.js";

const messages = [];
let running = null;

function item(role, text = "") {
  const line = make("li", role), top = make("div", "top");
  const thought = make("div", "thought"), said = make("div", "said", text);
  top.append(make("span", "who", role === "user" ? "You" : "Model"));
  if (role === "assistant") {
    const button = make("button", "", "Copy");
    button.type = "button";
    button.setAttribute("aria-label", "Copy this answer");
    button.addEventListener("click", () => copy(said.textContent, button));
    top.append(button);
  }
  line.append(top, thought, said);
  at("messages").append(line);
  showEnd(true);
  return { line, thought, said };
}

// Follows the text as it grows, unless its reader has scrolled up.
function showEnd(always) {
  const list = at("messages");
  if (always || list.scrollHeight - list.scrollTop - list.clientHeight < 80) list.scrollTop = list.scrollHeight;
}

function update() {
  at("send").disabled = Boolean(running);
  at("stop").disabled = !running;
  at("again").disabled = Boolean(running) || !messages.some((each) => each.role === "assistant");
  at("clear").disabled = Boolean(running) || !messages.length;
}

async function answer() {
  running = new AbortController();
  update();
  const shown = item("assistant");
  const began = performance.now();
  let first = null, tokens = 0, doubtful = 0, text = "", end = "broke off";
  at("told").textContent = "waiting for the first token";
  at("spent").textContent = "";
  announce("answering");
  try {
    const found = await ask("v1/chat/completions", {
      signal: running.signal,
      body: {
        model: at("model").value, messages, stream: true, stream_options: { include_usage: true },
        temperature: Number(at("temperature").value), max_tokens: Number(at("tokens").value),
      },
    });
    if (!found.ok) throw new Error(await failureOf(found));
    for await (const chunk of events(found)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) {
        tokens = chunk.usage.completion_tokens;
        doubtful = chunk.usage.completion_tokens_details?.doubtful_tokens ?? 0;
      }
      const { delta = {}, finish_reason: reason } = chunk.choices[0] ?? {};
      if (reason) end = reason === "length" ? "cut at its limit" : "complete";
      if (first === null && (delta.content || delta.reasoning_content)) first = performance.now();
      if (delta.reasoning_content) shown.thought.textContent += delta.reasoning_content;
      if (delta.content) { text += delta.content; shown.said.textContent = text; }
      if (!chunk.usage && (delta.content || delta.reasoning_content)) tokens += 1;
      showEnd(false);
      tell(began, first, tokens);
    }
  } catch (error) {
    end = error.name === "AbortError" ? "stopped" : error.message;
    if (error.name !== "AbortError") {
      shown.line.classList.add("failed");
      shown.said.textContent = `${text}\n${error.message}`.trim();
    }
  }
  if (doubtful) end += `, ${doubtful} of its tokens may be wrong`;
  messages.push({ role: "assistant", content: text });
  tell(began, first, tokens, end);
  announce(`answer ${end}`);
  running = null;
  update();
  showEnd(false);
  // The button that had the focus may be disabled by now. Readers elsewhere on the page stay there.
  if (document.activeElement === document.body || document.activeElement.disabled) at("text").focus();
}

function tell(began, first, tokens, end = "") {
  if (first === null) {
    if (end) at("told").textContent = `no answer: ${end}`;
    return;
  }
  const seconds = (performance.now() - first) / 1000;
  const each = tokens > 1 && seconds > 0 ? seconds / (tokens - 1) : null;
  at("told").textContent = `first token after ${((first - began) / 1000).toFixed(2)} s, ${tokens} tokens${each ? `, ${(1 / each).toFixed(1)} tokens/s` : ""}${end ? `; ${end}` : ""}`;
  const parts = expected();
  if (!each || !parts) return;
  // What is expected of the machines may be more than was measured here. Then it says how that was shared.
  const share = Math.min(1, each / (parts.compute + parts.network + parts.queue));
  const left = each - share * (parts.compute + parts.network + parts.queue);
  const spent = [
    `${milliseconds(share * parts.compute)} of computing`,
    `${milliseconds(share * parts.network)} of network`,
    ...(parts.queue ? [`${milliseconds(share * parts.queue)} of waiting for others`] : []),
    ...(left > 0.0005 ? [`${milliseconds(left)} for the rest`] : []),
  ];
  at("spent").textContent = `A token took ${milliseconds(each)}, about: ${spent.join(", ")}.`;
}

export function startChat() {
  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = at("text").value.trim();
    if (!text || running) return;
    at("text").value = "";
    messages.push({ role: "user", content: text });
    item("user", text);
    answer();
  });
  at("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); at("ask").requestSubmit(); }
  });
  at("stop").addEventListener("click", () => running?.abort());
  at("again").addEventListener("click", () => {
    if (messages.at(-1)?.role !== "assistant") return;
    messages.pop();
    at("messages").lastElementChild.remove();
    answer();
  });
  at("clear").addEventListener("click", () => {
    messages.length = 0;
    at("messages").replaceChildren();
    at("told").textContent = at("spent").textContent = "";
    update();
    at("text").focus();
  });
  update();
}
