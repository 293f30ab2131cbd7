// What can be done with an example: copy it, try it, send it to the prompt or the steering page, open its context.

// Model text as it was: without the marks that stand for line breaks.
export function plainText(node) {
  const copy = node.cloneNode(true);
  copy.querySelectorAll(".cut, .special, .part").forEach((mark) => mark.remove());
  copy.querySelectorAll(".nl").forEach((mark) => {
    const kept = { "⇥": "\t" }[mark.textContent] ?? "";
    mark.replaceWith(kept);
  });
  return copy.textContent;
}

const textOf = (element) => plainText(element.closest(".what").querySelector(".window"));

document.addEventListener("click", async (event) => {
  const target = event.target.closest("button, a");
  if (!target) return;
  if (target.matches("[data-context]") && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    await openContext(target.closest(".what"), target.getAttribute("href"));
  }
  if (target.matches("[data-less]")) {
    const what = target.closest(".what");
    what.replaceChildren(...windows.get(what));
    what.querySelector("[data-context]").focus();
  }
  if (target.matches("[data-copy-example]")) {
    await navigator.clipboard.writeText(textOf(target));
    target.textContent = "copied";
    setTimeout(() => (target.textContent = "copy"), 1200);
  }
  if (target.matches("[data-try-example]")) {
    const box = document.querySelector("#try-text");
    box.value = textOf(target).trim();
    box.form.requestSubmit();
    document.querySelector("#try").scrollIntoView({ block: "nearest" });
  }
});

// Links that take the example along get their address when they are about to be followed.
for (const kind of ["pointerover", "focusin"]) {
  document.addEventListener(kind, (event) => {
    const link = event.target.closest?.("a[data-with]");
    if (!link) return;
    const address = new URL(link.href);
    address.searchParams.set(link.dataset.with, textOf(link).trim().slice(0, 2000));
    link.href = address;
  });
}

// What an example showed before its whole context was opened in its place.
const windows = new WeakMap();
async function openContext(what, path) {
  windows.set(what, [...what.childNodes]);
  await htmx.ajax("GET", path, { target: what, swap: "innerHTML" });
  const tools = what.querySelector(".tools");
  if (!tools || what.querySelector("[data-context]")) return;
  const less = Object.assign(document.createElement("button"), { type: "button", className: "link", textContent: "less" });
  less.dataset.less = "";
  tools.append(less);
}

export function mount() {
  const template = document.querySelector("#example-tools");
  if (!template) return;
  document.querySelectorAll(".example .tools:not([data-made])").forEach((tools) => {
    tools.dataset.made = "";
    tools.append(template.content.cloneNode(true));
  });
}
