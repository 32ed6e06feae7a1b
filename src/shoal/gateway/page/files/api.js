// Requests to the gateway, and the events that it sends. One place knows the API key.

const KEY = "shoal-api-key";

export async function ask(path, { body, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    if (body) headers["Content-Type"] = "application/json";
    const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    if (answer.status !== 401) return answer;
    sessionStorage.setItem(KEY, await askForKey(key ? "This gateway does not know that key." : ""));
  }
}

let asking = null;

function askForKey(why) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    document.getElementById("key-told").textContent = why;
    dialog.addEventListener("close", () => { asking = null; resolve(document.getElementById("key").value); }, { once: true });
    dialog.showModal();
  });
  return asking;
}

export async function failureOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `${answer.status} ${answer.statusText}`;
  }
}

// The data of server-sent events, parsed. Ends with "[DONE]", or with the answer.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    for (let end; (end = held.indexOf("\n\n")) >= 0; held = held.slice(end + 2)) {
      const line = held.slice(0, end).split("\n").find((each) => each.startsWith("data: "));
      if (line === "data: [DONE]") return;
      if (line) yield JSON.parse(line.slice(6));
    }
  }
}
