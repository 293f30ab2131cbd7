// Mounts what it finds by data- attributes. Everything else is HTML and htmx.

const $ = (selector, root = document) => root.querySelector(selector);
const typing = (element) => element.matches("input, textarea, select, [contenteditable]");

// Model text as it was: without the marks that stand for line breaks.
function plainText(node) {
  const copy = node.cloneNode(true);
  copy.querySelectorAll(".cut, .special, .part").forEach((mark) => mark.remove());
  copy.querySelectorAll(".nl").forEach((mark) => {
    const kept = { "⇥": "\t" }[mark.textContent] ?? "";
    mark.replaceWith(kept);
  });
  return copy.textContent;
}

// A feature's path in this atlas, out of an address pasted from here or from neuronpedia.org.
function featurePath(text) {
  const found = text.trim().match(/^https?:\/\/[^/]+\/([\w.-]+)\/([\w.-]+)\/(\d+)(?:[?#].*)?$/);
  return found && `/${found[1]}/${found[2]}/${found[3]}`;
}

document.addEventListener("submit", (event) => {
  const field = event.target.querySelector("[data-find], [data-jump]");
  const path = field && featurePath(field.value);
  if (path) {
    event.preventDefault();
    location.assign(path);
  }
});

document.addEventListener("click", async (event) => {
  const target = event.target.closest("button, a");
  if (!target) return;
  if (target.matches("[data-keys-help]")) $("#keys").showModal();
  if (target.matches("[data-breaks]")) setBreaks(localStorage.breaks !== "real");
  if (target.matches("[data-context]") && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    await openContext(target.closest(".what"), target.getAttribute("href"));
  }
  if (target.matches("[data-less]")) {
    const what = target.closest(".what");
    what.replaceChildren(...windows.get(what));
    $("[data-context]", what).focus();
  }
  if (target.matches("[data-copy-example]")) {
    await navigator.clipboard.writeText(plainText($(".window", target.closest(".what"))));
    target.textContent = "copied";
    setTimeout(() => (target.textContent = "copy"), 1200);
  }
  if (target.matches("[data-try-example]")) {
    const box = $("#try-text");
    box.value = plainText($(".window", target.closest(".what"))).trim();
    box.form.requestSubmit();
    $("#try").scrollIntoView({ block: "nearest" });
  }
});

// What an example showed before its whole context was opened in its place.
const windows = new WeakMap();
async function openContext(what, path) {
  windows.set(what, [...what.cloneNode(true).childNodes]);
  await htmx.ajax("GET", path, { target: what, swap: "innerHTML" });
  const tools = $(".tools", what);
  if (!tools || $("[data-context]", what)) return;
  const less = Object.assign(document.createElement("button"), { type: "button", className: "link", textContent: "less" });
  less.dataset.less = "";
  tools.prepend(less, " ");
}

function setBreaks(real) {
  localStorage.breaks = real ? "real" : "";
  showBreaks();
}

function showBreaks() {
  const real = localStorage.breaks === "real";
  document.body.classList.toggle("real-breaks", real);
  document.querySelectorAll("[data-breaks]").forEach((b) => b.setAttribute("aria-pressed", String(real)));
}

const follow = (selector) => $(selector)?.click();
const keys = {
  "/": () => $("#find").focus(),
  j: () => follow("[data-next]"),
  ArrowRight: () => follow("[data-next]"),
  k: () => follow("[data-previous]"),
  ArrowLeft: () => follow("[data-previous]"),
  r: () => follow("[data-random]"),
  g: () => $("[data-jump]")?.focus(),
  t: () => $("#try-text, #prompt-text")?.focus(),
  w: () => {
    const widths = [...document.querySelectorAll("[data-width]")];
    const now = widths.findIndex((a) => a.getAttribute("aria-current") === "true");
    widths[(now + 1) % widths.length]?.click();
  },
  "?": () => $("#keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.target.matches?.("[data-submit-on-enter]") && event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    event.target.form.requestSubmit();
    return;
  }
  if (event.key === "Escape" && typing(event.target)) event.target.blur();
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || typing(event.target) || $("dialog[open]")) return;
  const act = keys[event.key];
  if (act) {
    event.preventDefault();
    act();
  }
});

// Tooltips at once, also on touch, instead of the browser's own after a second.
let tip;
function showTip(event) {
  const mark = event.target.closest?.(".window mark[title], .window mark[data-tip]");
  tip?.remove();
  tip = undefined;
  if (!mark) return;
  if (mark.title) {
    mark.dataset.tip = mark.title;
    mark.removeAttribute("title");
  }
  tip = document.createElement("div");
  tip.className = "tip";
  tip.textContent = mark.dataset.tip;
  document.body.append(tip);
  const box = mark.getClientRects()[0];
  tip.style.left = `${Math.max(4, Math.min(box.left + scrollX, document.documentElement.clientWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${box.top + scrollY - tip.offsetHeight - 4}px`;
}
document.addEventListener("pointerover", showTip);
document.addEventListener("click", showTip);

// Pages that need more than this load it themselves.
const parts = { "[data-steer]": "./steer.js", "[data-figure]": "./figures.js", "[data-upload]": "./upload.js" };
async function mount() {
  showBreaks();
  for (const [selector, file] of Object.entries(parts)) {
    if ($(selector)) (await import(file)).mount();
  }
}
document.addEventListener("htmx:after:swap", mount);
mount();
