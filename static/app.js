// Mounts what it finds by data- attributes, and the keys. Everything else is HTML and htmx.

const $ = (selector, root = document) => root.querySelector(selector);
const typing = (element) => element.matches("input, textarea, select, [contenteditable]");

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

const palette = async () => (await import("./palette.js")).open();

document.addEventListener("click", async (event) => {
  const target = event.target.closest("button, a");
  if (!target) return;
  if (target.matches("[data-keys-help]")) $("#keys").showModal();
  if (target.matches("[data-palette]")) palette();
  if (target.matches("[data-theme-switch]")) switchTheme();
  if (target.matches("[data-copy-code]")) {
    await navigator.clipboard.writeText($(target.dataset.copyCode).value);
    target.textContent = "Copied";
  }
});

// A selector that leads somewhere goes there when it is changed.
document.addEventListener("change", (event) => {
  if (!event.target.matches("[data-go]")) return;
  const jump = event.target.form.elements.to;
  jump.value ||= jump.placeholder;
  event.target.form.requestSubmit();
});

const follow = (selector) => $(selector)?.click();
const other = (selector) => $(`${selector}:not([aria-current])`)?.click();
const keys = {
  "/": () => $("#find")?.focus(),
  j: () => follow("[data-next]"),
  ArrowRight: () => follow("[data-next]"),
  k: () => follow("[data-previous]"),
  ArrowLeft: () => follow("[data-previous]"),
  r: () => follow("[data-random]"),
  g: () => $("[data-jump]")?.focus(),
  t: () => $("#try-text, #prompt-text")?.focus(),
  b: () => other("[data-breaks]"),
  s: () => other("[data-scale]"),
  m: () => follow("[data-bookmark]"),
  d: () => switchTheme(),
  w: () => {
    const widths = [...document.querySelectorAll("[data-width]")];
    const now = widths.findIndex((a) => a.getAttribute("aria-current") === "true");
    widths[(now + 1) % widths.length]?.click();
  },
  "?": () => $("#keys")?.showModal(),
};

document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k" && !event.shiftKey && !event.altKey) {
    event.preventDefault();
    palette();
    return;
  }
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

// Pages that need more than this load it themselves.
const parts = {
  "[data-steer], [data-sweep-plot]": "./steer.js",
  "[data-figure]": "./figures.js",
  "[data-live]": "./live.js",
  "[data-map]": "./map.js",
  "[data-lab]": "./prompt.js",
  "[data-upload]": "./upload.js",
  ".what": "./examples.js",
  ".window": "./tips.js",
};
async function mount() {
  for (const [selector, file] of Object.entries(parts)) {
    if ($(selector)) (await import(file)).mount();
  }
}
document.addEventListener("htmx:after:swap", mount);
mount();
