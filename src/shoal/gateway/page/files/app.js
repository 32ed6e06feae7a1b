import { ask, failureOf } from "./api.js";
import { startChat } from "./chat.js";
import { at, copy } from "./dom.js";
import { watch } from "./swarm.js";

const select = at("model");
const answer = await ask("v1/models");
if (answer.ok) for (const { id } of (await answer.json()).data) select.add(new Option(id, id));
else at("health").textContent = await failureOf(answer);
select.addEventListener("change", () => watch(select.value));
at("copy-join").addEventListener("click", (event) => copy(at("join").textContent, event.currentTarget));
startChat();
if (select.value) watch(select.value);
