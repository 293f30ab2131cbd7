// The list of chosen features: sliders, exact numbers, operations, and what they come to as a request.

export const number = (input) => Number.parseFloat(input.value);
const STEEPNESS = 4;
const LAST = 1000;
const rows = (root) => [...root.querySelectorAll("[data-feature]")];
const part = (row, name) => row.querySelector(`[data-${name}]`);

// The slider is exponential: fine near zero, coarse far out, the same both ways.
const toStrength = (place, reach) => Math.sign(place) * reach * (Math.expm1((STEEPNESS * Math.abs(place)) / LAST) / Math.expm1(STEEPNESS));
const toPlace = (strength, reach) => Math.sign(strength) * (LAST / STEEPNESS) * Math.log1p((Math.min(Math.abs(strength), reach) / reach) * Math.expm1(STEEPNESS));
const rounded = (value) => Number(value.toPrecision(3));

export function mountFeatures(root, changed) {
  rows(root).forEach(settle);
  root.addEventListener("input", (event) => {
    const row = event.target.closest("[data-feature]");
    if (row) follow(row, event.target);
    if (row || event.target.matches("[data-multiplier]")) changed();
  });
  root.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.matches("[data-add]")) {
      add(root, JSON.parse(button.dataset.add));
      changed();
    }
    if (button?.matches("[data-remove]")) {
      button.closest("[data-feature]").remove();
      root.querySelector("[data-none]").hidden = rows(root).length > 0;
      changed();
      root.querySelector("#choose").focus();
    }
  });
}

function follow(row, input) {
  const [range, exact] = [part(row, "range"), part(row, "strength")];
  if (input === range) exact.value = rounded(toStrength(Number(range.value), Number(range.dataset.reach)));
  settle(row);
}

// Everything about a row that hangs on its values.
function settle(row) {
  const [range, exact, times] = [part(row, "range"), part(row, "strength"), part(row, "times")];
  const [strength, max] = [number(exact), Number(row.dataset.max)];
  if (Number.isFinite(strength)) {
    // The exact field may go beyond the slider's ends; the slider then grows.
    if (Math.abs(strength) > Number(range.dataset.reach)) range.dataset.reach = Math.abs(strength);
    range.value = Math.round(toPlace(strength, Number(range.dataset.reach)));
    range.setAttribute("aria-valuetext", String(strength));
  }
  const operation = part(row, "operation").value;
  const unused = operation === "ablate";
  range.disabled = unused;
  exact.readOnly = unused;
  row.classList.toggle("idle", !part(row, "on").checked);
  times.textContent = max > 0 && Number.isFinite(strength) && (operation === "add" || operation === "clamp") ? `${(strength / max).toFixed(2)} × its highest activation` : "";
  if (row.dataset.vector) part(row, "link").removeAttribute("href");
}

export function add(root, feature) {
  const row = root.querySelector("[data-row]").content.firstElementChild.cloneNode(true);
  const name = `${feature.source}/${feature.index}`;
  Object.assign(row.dataset, { source: feature.source, index: feature.index, max: feature.max, vector: feature.vector ? "yes" : "" });
  part(row, "link").href = `/${root.dataset.model}/${name}`;
  part(row, "name").textContent = name;
  part(row, "label").textContent = feature.label;
  row.querySelector('input[name="source"]').value = feature.source;
  row.querySelector('input[name="index"]').value = feature.index;
  part(row, "on").value = `${feature.source}:${feature.index}`;
  part(row, "range").dataset.reach = feature.reach;
  part(row, "strength").value = feature.strength;
  part(row, "on").setAttribute("aria-label", `Steer with ${name}`);
  part(row, "remove").setAttribute("aria-label", `Remove feature ${feature.index}`);
  part(row, "range").setAttribute("aria-label", `Strength of feature ${feature.index}`);
  part(row, "strength").setAttribute("aria-label", `Exact strength of feature ${feature.index}`);
  root.querySelector("[data-features]").append(row);
  root.querySelector("[data-none]").hidden = true;
  root.querySelector("#choose").value = "";
  root.querySelector("#choices").replaceChildren();
  settle(row);
  part(row, "range").focus();
}

// "1, 4-6" as [1, 4, 5, 6].
function positions(text) {
  return text.split(",").flatMap((piece) => {
    const [first, last] = piece.split("-").map((n) => Number.parseInt(n, 10));
    if (!Number.isInteger(first)) return [];
    return Array.from({ length: Math.max(1, Math.min(4096, (Number.isInteger(last) ? last : first) - first + 1)) }, (_, n) => first + n);
  });
}

// What is switched on, or what is switched off, as the API takes it.
export function steeredFeatures(root, on = true) {
  return rows(root)
    .filter((row) => part(row, "on").checked === on)
    .map((row) => ({
      modelId: root.dataset.model,
      layer: row.dataset.source,
      index: row.dataset.index,
      strength: number(part(row, "strength")),
      operation: part(row, "operation").value,
      positions: part(row, "positions").value,
      at: positions(part(row, "at").value),
    }));
}

export const names = (root) => steeredFeatures(root).map((f) => `${f.layer}/${f.index}`);
