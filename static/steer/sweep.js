// Sweeps: the form, and a table and the trade-off of what came back.

import { post } from "./api.js";
import { names, number } from "./features.js";

export function mountSweep(root, asked) {
  const box = root.querySelector("[data-sweep]");
  const form = box.querySelector("[data-sweep-form]");
  const status = box.querySelector("[data-sweep-status]");
  const refill = () => {
    const list = names(root);
    fill(form.first, list.map((name, n) => [n, name]));
    fill(form.second, [["", "nothing"], ...list.map((name, n) => [n, name])]);
    form.querySelectorAll("[data-grid]").forEach((field) => (field.hidden = form.second.value === ""));
  };
  box.addEventListener("toggle", refill);
  form.addEventListener("change", refill);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    refill();
    if (!names(root).length) return void (status.textContent = "Choose a feature first.");
    const axes = [{ feature: Number(form.first.value), strengths: steps(form.from, form.to, form.steps) }];
    if (form.second.value !== "") axes.push({ feature: Number(form.second.value), strengths: steps(form.from2, form.to2, form.steps2) });
    if (axes.length === 2 && axes[0].feature === axes[1].feature) return void (status.textContent = "A grid needs two different features.");
    status.textContent = "Generating…";
    try {
      const answer = await post("/api/steer/sweep", { ...asked(), controls: [], n_samples: 1, n_logprobs: 0, axes });
      if (answer.sweepUrl) return void location.assign(answer.sweepUrl);
      status.textContent = answer.suggested ? `Suggested: ${answer.suggested.strengths.join(" and ")}, ${answer.suggested.why}.` : "No strength raised the activation and left the text fluent.";
      const labels = axes.map((axis) => names(root)[axis.feature]);
      box.querySelector("[data-sweep-result]").replaceChildren(plot(answer.points, answer.suggested), table(answer.points, labels));
    } catch (error) {
      status.textContent = error.message;
    }
  });
  return refill;
}

function fill(select, options) {
  const chosen = select.value;
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  if ([...select.options].some((option) => option.value === chosen)) select.value = chosen;
}

function steps(from, to, count) {
  const [first, last, n] = [number(from), number(to), Math.max(2, number(count))];
  return Array.from({ length: n }, (_, i) => Number((first + ((last - first) * i) / (n - 1)).toPrecision(6)));
}

function table(points, labels) {
  const made = document.createElement("table");
  made.className = "list sweep-table";
  const head = made.createTHead().insertRow();
  for (const words of [...labels, "perplexity", "activation", "repetition", "text"]) head.append(Object.assign(document.createElement("th"), { textContent: words, className: words === "text" ? "" : "n" }));
  const body = made.createTBody();
  for (const point of points) {
    const row = body.insertRow();
    if (point.strengths.length) point.strengths.forEach((s) => (row.insertCell().textContent = s));
    else Object.assign(row.insertCell(), { textContent: "model alone", colSpan: labels.length });
    for (const value of [point.perplexity, point.activation, point.repetition]) row.insertCell().textContent = value === null ? "–" : value.toPrecision(3);
    for (const cell of row.cells) cell.className = "n";
    const text = row.insertCell();
    text.textContent = text.title = point.text;
  }
  const scroll = document.createElement("div");
  scroll.className = "scroll";
  scroll.append(made);
  return scroll;
}

const SVG = "http://www.w3.org/2000/svg";
function shape(kind, attributes, text) {
  const made = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
}

// Perplexity (logarithmic, upwards) against activation: right and low is what one wants.
export function plot(points, suggested) {
  const usable = points.filter((p) => p.perplexity !== null && p.activation !== null);
  if (usable.length < 2) return document.createTextNode("");
  const [width, height] = [420, 190];
  const [xs, ys] = [usable.map((p) => p.activation), usable.map((p) => Math.log(p.perplexity))];
  const scale = (values, v, size) => (size * (v - Math.min(...values))) / (Math.max(...values) - Math.min(...values) || 1);
  const title = "Perplexity under the model alone against the feature's activation";
  const svg = shape("svg", { class: "chart tradeoff", viewBox: `-34 -14 ${width + 60} ${height + 44}`, role: "img", "aria-label": title });
  svg.append(shape("line", { x1: 0, x2: width, y1: height, y2: height }), shape("line", { x1: 0, x2: 0, y1: 0, y2: height }));
  svg.append(shape("text", { x: width, y: height + 24, "text-anchor": "end" }, "mean activation →"), shape("text", { x: 6, y: -4 }, "perplexity ↑"));
  for (const [value, anchor] of [[Math.min(...xs), "start"], [Math.max(...xs), "end"]]) svg.append(shape("text", { x: scale(xs, value, width), y: height + 12, "text-anchor": anchor }, value.toPrecision(3)));
  for (const value of [Math.min(...ys), Math.max(...ys)]) svg.append(shape("text", { x: -4, y: height - scale(ys, value, height) + 3, "text-anchor": "end" }, Math.exp(value).toPrecision(3)));
  const labels = new Map(); // what lies in one place has one label
  for (const [n, point] of usable.entries()) {
    const [x, y] = [scale(xs, xs[n], width), height - scale(ys, ys[n], height)];
    const chosen = suggested && JSON.stringify(suggested.strengths) === JSON.stringify(point.strengths);
    svg.append(shape("circle", { cx: x, cy: y, r: chosen ? 5 : 3, class: chosen ? "chosen" : "" }));
    const label = point.strengths.length ? point.strengths.join(", ") : "alone";
    const place = `${Math.round(x / 4)},${Math.round(y / 4)}`;
    if (labels.has(place)) labels.get(place).textContent += `; ${label}`;
    else svg.append(labels.set(place, shape("text", { x: x + 6, y: y - 4 }, label)).get(place));
  }
  return svg;
}

export function mountPlots() {
  document.querySelectorAll("[data-sweep-plot]").forEach((box) => {
    if (box.querySelector("svg")) return;
    const { points, suggested } = JSON.parse(box.querySelector("script").textContent);
    box.append(plot(points, suggested));
  });
}
