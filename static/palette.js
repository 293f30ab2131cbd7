// The command palette: Ctrl K. The server says where words lead (/palette); this file moves through its list.

let dialog;
let waiting;

function build() {
  dialog = document.createElement("dialog");
  dialog.className = "palette";
  dialog.setAttribute("aria-label", "Go to");
  dialog.innerHTML = `<input type="text" role="combobox" aria-label="Go to a page, an SAE, a feature or a label"
    aria-expanded="true" aria-controls="palette-options" aria-autocomplete="list" spellcheck="false" autocomplete="off"
    placeholder="A page, an SAE, an index, words of a label, a pasted address"><div class="palette-list"></div>`;
  document.body.append(dialog);
  const input = dialog.querySelector("input");
  input.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(list, 80);
  });
  input.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      choose(step);
    }
    if (event.key === "Enter") {
      event.preventDefault();
      go();
    }
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
    const option = event.target.closest("[data-href]");
    if (option) location.assign(option.dataset.href);
  });
}

export function open() {
  if (!dialog) build();
  if (dialog.open) return dialog.close();
  dialog.showModal();
  const input = dialog.querySelector("input");
  input.value = "";
  input.focus();
  list();
}

let asked;
async function list() {
  asked?.abort();
  asked = new AbortController();
  const q = dialog.querySelector("input").value;
  const parameters = new URLSearchParams({ q, here: location.pathname });
  try {
    const answer = await fetch(`/palette?${parameters}`, { signal: asked.signal, headers: { "hx-request": "true" } });
    dialog.querySelector(".palette-list").innerHTML = await answer.text();
    dialog.dataset.listed = q;
    choose(0);
  } catch (error) {
    if (error.name !== "AbortError") dialog.querySelector(".palette-list").textContent = "The server does not answer.";
  }
}

function choose(step) {
  const options = [...dialog.querySelectorAll("[role=option]")];
  const now = options.findIndex((o) => o.getAttribute("aria-selected") === "true");
  options[now]?.setAttribute("aria-selected", "false");
  const chosen = options[(Math.max(now, 0) + step + options.length) % options.length];
  const input = dialog.querySelector("input");
  if (!chosen) return input.removeAttribute("aria-activedescendant");
  chosen.setAttribute("aria-selected", "true");
  chosen.scrollIntoView({ block: "nearest" });
  input.setAttribute("aria-activedescendant", chosen.id);
}

// What was typed last may still be on its way: the list is asked once more before its first line is followed.
async function go() {
  clearTimeout(waiting);
  if (dialog.dataset.listed !== dialog.querySelector("input").value) await list();
  dialog.querySelector("[aria-selected=true]")?.click();
}
