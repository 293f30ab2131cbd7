// Pages whose jobs move: fetches the parts that changed, and reads plots by pointer, keyboard and dragging.

const EVERY = 2000;
const SLOWEST = 30000;
let timer;
let wait = EVERY;
let busy = false;

const box = () => document.querySelector("[data-live]");
const moving = () => !!document.querySelector("[data-live] [data-moving], [data-live][data-moving]");

// Refreshing -------------------------------------------------------------------------------------------------------

async function refresh() {
  const live = box();
  if (!live || busy) return;
  busy = true;
  try {
    const address = live.dataset.live;
    const url = new URL(address, location.href);
    url.searchParams.set("seen", [...live.querySelectorAll("[data-version]")].map((e) => `${e.id}:${e.dataset.version}`).join(" "));
    const response = await fetch(url, { headers: { accept: "application/json" } });
    if (!response.ok) throw new Error(response.status);
    const { parts } = await response.json();
    // Somebody looked at it otherwise meanwhile: the answer is to an earlier question.
    if (live.dataset.live === address) for (const [id, html] of Object.entries(parts)) put(id, html);
    wait = EVERY;
    live.classList.remove("offline");
  } catch {
    wait = Math.min(wait * 2, SLOWEST);
    live.classList.add("offline");
  } finally {
    busy = false;
  }
}

function put(id, html) {
  const old = document.getElementById(id);
  if (!old) return;
  const template = document.createElement("template");
  template.innerHTML = html;
  const fresh = template.content.firstElementChild;
  const here = document.activeElement;
  const inside = old.contains(here);
  if (inside && here.matches("input:not([type=range]), select, textarea")) return; // being filled in: next time
  for (const open of old.querySelectorAll("details[id]")) {
    const same = fresh.querySelector(`#${open.id}`);
    if (same) same.open = open.open;
  }
  const lines = old.querySelector(".lines");
  const [top, atEnd] = lines ? [lines.scrollTop, lines.scrollTop + lines.clientHeight > lines.scrollHeight - 8] : [];
  const place = inside ? focusable(old).indexOf(here) : -1;
  old.replaceWith(fresh);
  const after = fresh.querySelector(".lines");
  if (after) after.scrollTop = atEnd ? after.scrollHeight : top;
  if (place >= 0) focusable(fresh)[place]?.focus({ preventScroll: true });
  window.htmx?.process?.(fresh);
  quieten(fresh);
  if (fresh.matches(".plot")) mark(fresh);
}

const focusable = (root) => [...root.querySelectorAll("a, button, input, select, summary, [tabindex]")];

function again() {
  clearTimeout(timer);
  if (!box() || !moving()) return;
  timer = setTimeout(async () => {
    if (!document.hidden) await refresh();
    again();
  }, wait);
}

document.addEventListener("visibilitychange", async () => {
  if (document.hidden || !moving()) return;
  await refresh();
  again();
});

// Looking otherwise ------------------------------------------------------------------------------------------------

// The address changes and everything that depends on it, without the page being left.
async function look(href) {
  const live = box();
  const url = new URL(href, location.href);
  history.replaceState(history.state, "", url);
  const parts = new URL(live.dataset.live, location.href);
  live.dataset.live = parts.pathname + url.search;
  const page = await (await fetch(url, { headers: { accept: "text/html" } })).text();
  if (live.dataset.live !== parts.pathname + url.search) return;
  const fresh = new DOMParser().parseFromString(page, "text/html").querySelector("[data-live]");
  if (!fresh) return location.reload();
  const here = document.activeElement;
  const place = live.contains(here) ? focusable(live).indexOf(here) : -1;
  const opened = [...live.querySelectorAll("details[id]")].map((d) => [d.id, d.open]);
  const lines = live.querySelector(".lines")?.scrollTop;
  live.replaceChildren(...fresh.childNodes);
  for (const [id, open] of opened) {
    const same = document.getElementById(id);
    if (same) same.open = open;
  }
  if (lines && live.querySelector(".lines")) live.querySelector(".lines").scrollTop = lines;
  if (place >= 0) focusable(live)[place]?.focus({ preventScroll: true });
  window.htmx?.process?.(live);
  quieten(live);
  again();
}

document.addEventListener("click", (event) => {
  const link = event.target.closest?.("[data-live] a[data-view]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  look(link.href);
});

document.addEventListener("input", (event) => {
  const form = event.target.closest?.("form[data-look]");
  if (!form) return;
  const asked = new URLSearchParams(new FormData(form));
  if (event.target.name === "sae") asked.delete("look");
  look(`${form.getAttribute("action")}?${asked}`);
});

// With this script the slider answers at once.
function quieten(root) {
  root.querySelectorAll("form[data-look] [data-show]").forEach((button) => (button.hidden = true));
}

// Reading plots ----------------------------------------------------------------------------------------------------

const WIDTH = 360;
const HEIGHT = 150;
let at = null; // where the crosshair stands, in the units of the axis
let over = null; // the id of the plot it is read in
let drag = null;

const dataOf = (plot) => JSON.parse(plot.querySelector("script").textContent);
const svg = (name, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};
const number = (value) => (Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4))));

function place(event, plot) {
  const picture = plot.querySelector("svg");
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
  return Math.max(0, Math.min(WIDTH, point.x));
}

function nearest(xs, x) {
  let low = 0;
  let high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}

// A line in every plot at the same step, and beside the pointer what the curves are there.
function mark(plot) {
  plot.querySelectorAll(".cross, .readout").forEach((e) => e.remove());
  if (at === null) return;
  const data = dataOf(plot);
  if (!data.lines.length || at < data.first || at > data.last) return;
  const across = ((at - data.first) / (data.last - data.first)) * WIDTH;
  const picture = plot.querySelector("svg");
  const cross = svg("g", { class: "cross" });
  cross.append(svg("line", { x1: across, x2: across, y1: 0, y2: HEIGHT }));
  const rows = data.lines.map((line) => {
    const i = nearest(line.x, at);
    const y = data.log ? Math.log10(Math.max(line.y[i], 1e-300)) : line.y[i];
    const up = HEIGHT - Math.max(0, Math.min(1, (y - data.low) / (data.high - data.low))) * HEIGHT;
    cross.append(svg("circle", { cx: ((line.x[i] - data.first) / (data.last - data.first)) * WIDTH, cy: up, r: 2.5, class: line.css }));
    return { ...line, step: line.x[i], value: line.y[i] };
  });
  picture.append(cross);
  if (plot.id !== over) return;
  const readout = document.createElement("div");
  readout.className = "readout";
  readout.setAttribute("role", "status");
  const head = document.createElement("p");
  head.textContent = number(rows[0].step);
  readout.append(head);
  for (const row of rows.toSorted((a, b) => b.value - a.value).slice(0, 12)) {
    const line = document.createElement("p");
    const key = document.createElement("i");
    key.className = row.css;
    line.append(key, rows.length > 1 ? ` ${row.name} ` : " ", number(row.value));
    readout.append(line);
  }
  plot.append(readout);
  const left = (across / WIDTH) * picture.clientWidth * 0.87 + picture.clientWidth * 0.1;
  readout.classList.toggle("left", left > picture.clientWidth / 2);
  readout.style.left = `${left}px`;
}

const markAll = () => document.querySelectorAll(".plot").forEach(mark);

function leave() {
  at = over = null;
  markAll();
}

document.addEventListener("pointermove", (event) => {
  const plot = event.target.closest?.("[data-live] .plot");
  if (!plot || !event.target.closest("svg")) {
    if (over && !drag) leave();
    return;
  }
  const data = dataOf(plot);
  over = plot.id;
  at = data.first + (place(event, plot) / WIDTH) * (data.last - data.first);
  markAll();
  if (drag?.plot === plot.id) selection(plot, drag.from, place(event, plot));
});

function selection(plot, from, to) {
  plot.querySelector(".chosen-span")?.remove();
  plot.querySelector("svg").append(svg("rect", { class: "chosen-span", x: Math.min(from, to), y: 0, width: Math.abs(to - from), height: HEIGHT }));
}

document.addEventListener("pointerdown", (event) => {
  const plot = event.target.closest?.("[data-live] .plot");
  if (!plot || !event.target.closest("svg") || event.button !== 0 || event.pointerType === "touch") return;
  if (!dataOf(plot).lines.length) return;
  event.preventDefault();
  plot.querySelector("svg").focus({ preventScroll: true });
  drag = { plot: plot.id, from: place(event, plot) };
});

document.addEventListener("pointerup", (event) => {
  const plot = drag && document.getElementById(drag.plot);
  const from = drag?.from;
  drag = null;
  if (!plot) return;
  plot.querySelector(".chosen-span")?.remove();
  const to = place(event, plot);
  if (Math.abs(to - from) < 6) return;
  const data = dataOf(plot);
  const [first, last] = [Math.min(from, to), Math.max(from, to)].map((x) => Math.round(data.first + (x / WIDTH) * (data.last - data.first)));
  const url = new URL(location.href);
  url.searchParams.set("first", first);
  url.searchParams.set("last", last);
  leave();
  look(url.href);
});

document.addEventListener("dblclick", (event) => {
  if (!event.target.closest?.("[data-live] .plot svg")) return;
  const url = new URL(location.href);
  url.searchParams.delete("first");
  url.searchParams.delete("last");
  look(url.href);
});

document.addEventListener(
  "keydown",
  (event) => {
    const plot = event.target.closest?.(".plot");
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!plot || (!step && event.key !== "Escape")) return;
    event.preventDefault();
    if (!step) return leave();
    const data = dataOf(plot);
    const xs = data.lines[0]?.x ?? [];
    const now = at === null ? (step > 0 ? -1 : xs.length) : nearest(xs, at);
    over = plot.id;
    at = xs[Math.max(0, Math.min(xs.length - 1, now + step * Math.max(1, Math.round(xs.length / 100))))] ?? null;
    markAll();
  },
  true,
);

// The row of the table and its curves belong together.
document.addEventListener("pointerover", (event) => {
  const row = event.target.closest?.("tr[data-run]");
  for (const path of document.querySelectorAll(".plot .lines path")) {
    const own = !row || row.dataset.run.split(" ").every((name) => path.classList.contains(name));
    path.classList.toggle("faint", !own);
  }
});

export function mount() {
  const live = box();
  if (!live) return;
  quieten(live);
  again();
}
