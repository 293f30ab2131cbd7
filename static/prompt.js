// The prompt lab: arrow keys between tokens, shift-click to choose a range, the keyboard's place kept over a swap.

let asked = false;
let from;

export function mount() {
  const form = document.querySelector("[data-lab]");
  const chosen = document.querySelector('[data-tokens] .tok[aria-pressed="true"]');
  if (asked && chosen && (document.activeElement === document.body || !document.activeElement)) chosen.focus({ preventScroll: true });
  if (chosen) from = Number(chosen.dataset.position);
  if (!form || form.dataset.mounted) return;
  form.dataset.mounted = "yes";
  form.addEventListener("change", (event) => {
    if (event.target.matches('select[name="by"], select[name="sort"], select[name="below"], input[name="bos"]') && form.querySelector('[name="text"]')?.value.trim()) form.requestSubmit();
  });
  document.addEventListener("keydown", walk);
  document.addEventListener("click", range, true);
}

function walk(event) {
  const token = event.target.closest?.("[data-tokens] .tok");
  if (!token || event.ctrlKey || event.metaKey || event.altKey) return;
  const all = [...document.querySelectorAll("[data-tokens] .tok")];
  const place = all.indexOf(token);
  const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: all.length - 1, ArrowDown: below(all, token, 1), ArrowUp: below(all, token, -1) }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  event.stopPropagation();
  all[to]?.focus();
}

// The token under or over this one.
function below(all, token, way) {
  const box = token.getBoundingClientRect();
  const rows = all.filter((other) => way * (other.getBoundingClientRect().top - box.top) > box.height / 2);
  const near = (other) => {
    const place = other.getBoundingClientRect();
    return Math.abs(place.top - box.top) * 1000 + Math.abs(place.left - box.left);
  };
  return rows.length ? all.indexOf(rows.reduce((a, b) => (near(a) <= near(b) ? a : b))) : all.indexOf(token);
}

function range(event) {
  const token = event.target.closest?.("[data-tokens] .tok");
  if (!token) return;
  asked = true;
  if (!event.shiftKey || from === undefined) return;
  event.preventDefault();
  event.stopPropagation();
  const ends = [from, Number(token.dataset.position)].sort((a, b) => a - b);
  const form = document.querySelector("[data-lab]");
  form.querySelector('[name="select"]').value = ends.join("-");
  form.querySelector('[name="sort"]').value = "sum";
  form.requestSubmit();
}
