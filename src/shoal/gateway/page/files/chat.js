// A conversation with one of the models.

import { ask, events, failureOf } from "./api.js";

const at = (id) => document.getElementById(id);
const messages = [];
let running = null;

function item(role, text = "") {
  const line = document.createElement("li");
  line.className = role;
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = role === "user" ? "You" : "Model";
  const thought = document.createElement("span");
  thought.className = "thought";
  const said = document.createElement("span");
  said.textContent = text;
  line.append(who, thought, said);
  if (role === "assistant") {
    const copy = document.createElement("button");
    copy.type = "button";
    copy.textContent = "Copy";
    copy.addEventListener("click", () => navigator.clipboard.writeText(said.textContent));
    line.append(document.createElement("br"), copy);
  }
  at("messages").append(line);
  line.scrollIntoView({ block: "end" });
  return { line, thought, said };
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
  let first = null, tokens = 0, text = "";
  at("told").textContent = "waiting for the first token";
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
      if (chunk.usage) tokens = chunk.usage.completion_tokens;
      const delta = chunk.choices[0]?.delta ?? {};
      if (first === null && (delta.content || delta.reasoning_content)) first = performance.now();
      if (delta.reasoning_content) shown.thought.textContent += delta.reasoning_content;
      if (delta.content) { text += delta.content; shown.said.textContent = text; tokens += 1; }
      at("messages").scrollTop = at("messages").scrollHeight;
      tell(began, first, tokens);
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      shown.line.classList.add("failed");
      shown.said.textContent = `${text}\n${error.message}`.trim();
    }
  }
  messages.push({ role: "assistant", content: text });
  tell(began, first, tokens);
  running = null;
  update();
  at("text").focus();
}

function tell(began, first, tokens) {
  if (first === null) return;
  const seconds = (performance.now() - first) / 1000;
  const rate = tokens > 1 && seconds > 0 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  at("told").textContent = `first token after ${((first - began) / 1000).toFixed(2)} s, ${tokens} tokens${rate}`;
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
    at("told").textContent = "";
    update();
  });
  update();
}
