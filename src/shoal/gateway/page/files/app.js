import { ask } from "./api.js";
import { startChat } from "./chat.js";
import { watch } from "./swarm.js";

const select = document.getElementById("model");
const found = await (await ask("v1/models")).json();
for (const { id } of found.data) select.add(new Option(id, id));
select.addEventListener("change", () => watch(select.value));
document.getElementById("copy-join").addEventListener("click", () => navigator.clipboard.writeText(document.getElementById("join").textContent));
startChat();
watch(select.value);
