// Small things that all parts of the page do with elements. What is equal already is not touched.

export const at = (id) => document.getElementById(id);

export function make(tag, className = "", text = "") {
  const found = document.createElement(tag);
  if (className) found.className = className;
  if (text) found.textContent = text;
  return found;
}

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setClass(element, name) {
  if (element.className !== name) element.className = name;
}

export function setLabel(element, text) {
  if (element.getAttribute("aria-label") !== text) element.setAttribute("aria-label", text);
}

// Puts an element across blocks `start` to `end` of a track.
export function setSpan(element, start, end, numBlocks) {
  const place = `${start} ${end} ${numBlocks}`;
  if (element.dataset.place === place) return;
  element.dataset.place = place;
  element.style.left = `${(100 * start) / numBlocks}%`;
  element.style.width = `${(100 * (end - start)) / numBlocks}%`;
}

// Makes `list` have exactly these children in this order, and moves only those that are elsewhere.
export function arrange(list, children) {
  let next = list.firstElementChild;
  for (const child of children) {
    if (child === next) next = next.nextElementSibling;
    else list.insertBefore(child, next);
  }
  while (next) {
    const gone = next;
    next = next.nextElementSibling;
    gone.remove();
  }
}

// For those who hear the page: what just happened.
export function announce(text) {
  at("announced").textContent = text;
}

export const milliseconds = (seconds) => `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms`;

export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyByHand(text); // without HTTPS, browsers have no clipboard on other machines than this one
  }
  const before = button.dataset.label ?? (button.dataset.label = button.textContent);
  button.textContent = "Copied";
  announce("copied");
  setTimeout(() => { button.textContent = before; }, 1500);
}

function copyByHand(text) {
  const focused = document.activeElement, field = make("textarea", "unseen");
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
  focused?.focus();
}
