// The steering page: chosen features, and the two texts of POST /api/steer as they grow.

import { ready } from "./loading.js";

const number = (input) => Number.parseFloat(input.value);

export function mount() {
  const root = document.querySelector("[data-steer]");
  if (root.dataset.mounted) return;
  root.dataset.mounted = "yes";
  const form = root.querySelector("[data-form]");
  root.addEventListener("input", (event) => follow(event.target));
  root.addEventListener("click", (event) => {
    const target = event.target.closest("button");
    if (!target) return;
    if (target.matches("[data-add]")) add(root, JSON.parse(target.dataset.add));
    if (target.matches("[data-remove]")) remove(root, target.closest("[data-feature]"));
    if (target.matches("[data-stop]")) root.run?.abort();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    generate(root, form);
  });
  form.prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  root.querySelectorAll("[data-feature]").forEach(times);
}

function follow(input) {
  const row = input.closest("[data-feature]");
  if (!row) return;
  const [range, exact] = [row.querySelector("[data-range]"), row.querySelector("[data-strength]")];
  if (input === range) exact.value = range.value;
  if (input === exact && Number.isFinite(number(exact))) {
    // The exact field may go beyond the slider's ends; the slider then grows.
    const reach = Math.max(Math.abs(number(exact)), Number(range.max));
    range.min = -reach;
    range.max = reach;
    range.step = "any";
    range.value = exact.value;
  }
  times(row);
}

function times(row) {
  const max = Number(row.dataset.max);
  const strength = number(row.querySelector("[data-strength]"));
  row.querySelector("[data-times]").textContent =
    max > 0 && Number.isFinite(strength) ? `${(strength / max).toFixed(2)} × its highest activation` : "";
}

function add(root, feature) {
  const row = root.querySelector("[data-row]").content.firstElementChild.cloneNode(true);
  Object.assign(row.dataset, { source: feature.source, index: feature.index, max: feature.max });
  row.querySelector("[data-link]").href = `/${root.dataset.model}/${feature.source}/${feature.index}`;
  row.querySelector("[data-name]").textContent = `${feature.source}/${feature.index}`;
  row.querySelector("[data-label]").textContent = feature.label;
  row.querySelector("[data-remove]").setAttribute("aria-label", `Remove feature ${feature.index}`);
  const [range, exact] = [row.querySelector("[data-range]"), row.querySelector("[data-strength]")];
  Object.assign(range, { min: -feature.reach, max: feature.reach, step: feature.step, value: feature.strength });
  range.setAttribute("aria-label", `Strength of feature ${feature.index}`);
  exact.value = feature.strength;
  exact.setAttribute("aria-label", `Exact strength of feature ${feature.index}`);
  root.querySelector("[data-features]").append(row);
  root.querySelector("[data-none]").hidden = true;
  root.querySelector("#choose").value = "";
  root.querySelector("#choices").replaceChildren();
  times(row);
  range.focus();
}

function remove(root, row) {
  row.remove();
  root.querySelector("[data-none]").hidden = Boolean(root.querySelector("[data-feature]"));
}

function asked(root, form) {
  const features = [...root.querySelectorAll("[data-feature]")].map((row) => ({
    modelId: root.dataset.model,
    layer: row.dataset.source,
    index: row.dataset.index,
    strength: number(row.querySelector("[data-strength]")),
  }));
  return {
    prompt: form.prompt.value,
    modelId: root.dataset.model,
    features,
    temperature: number(form.temperature),
    n_tokens: number(form.n_tokens),
    freq_penalty: number(form.freq_penalty),
    seed: number(form.seed),
    strength_multiplier: 1,
    steer_method: form.steer_method.value,
    stream: true,
  };
}

// The address holds everything that was asked, so that it can be sent to somebody or come back to.
function address(root, body) {
  const query = new URLSearchParams();
  for (const feature of body.features) {
    query.append("source", feature.layer);
    query.append("index", feature.index);
    query.append("strength", feature.strength);
  }
  for (const name of ["prompt", "temperature", "n_tokens", "seed", "freq_penalty"]) query.set(name, body[name]);
  query.set("method", body.steer_method);
  return `/${root.dataset.model}/steer?${query}`;
}

async function generate(root, form) {
  root.run?.abort();
  const run = (root.run = new AbortController());
  const body = asked(root, form);
  const began = performance.now();
  const say = (text) => (root.querySelector("[data-status]").textContent = text);
  show(root, body.prompt, { DEFAULT: "", STEERED: "" });
  root.querySelector("[data-problem]").hidden = true;
  root.querySelector("[data-share]").hidden = true;
  root.querySelector("[data-stop]").hidden = false;
  root.dataset.running = "yes";
  if (address(root, body).length < 4000) history.replaceState(null, "", address(root, body));
  let n = 0;
  try {
    const sources = body.features.map((feature) => feature.layer);
    await ready(body.modelId, sources, root.querySelector("[data-loading]"), run.signal);
    say("Waiting for the first token…");
    const response = await fetch("/api/steer", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      signal: run.signal,
    });
    if (!response.ok) throw new Error((await response.json()).message);
    for await (const state of events(response.body)) {
      if (state.error) throw new Error(state.error);
      show(root, body.prompt, state);
      n += 1;
      const seconds = (performance.now() - began) / 1000;
      say(`${n} tokens in ${seconds.toFixed(1)} s`);
      if (state.shareUrl) share(root, state.shareUrl);
    }
  } catch (error) {
    if (error.name === "AbortError") say(`Stopped after ${n} tokens.`);
    else problem(root, error.message, say);
  } finally {
    if (root.run === run) {
      root.querySelector("[data-stop]").hidden = true;
      delete root.dataset.running;
    }
  }
}

// Server-sent events of a POST: each `data:` is the whole state so far.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data:")) yield JSON.parse(part.slice(5));
    }
  }
}

function show(root, prompt, state) {
  for (const [name, text] of [["default", state.DEFAULT], ["steered", state.STEERED]]) {
    const before = document.createElement("span");
    before.className = "muted";
    before.textContent = prompt;
    root.querySelector(`[data-${name}]`).replaceChildren(before, text);
  }
}

function share(root, path) {
  const line = root.querySelector("[data-share]");
  const link = line.querySelector("a");
  link.href = path;
  link.textContent = path;
  line.hidden = false;
}

function problem(root, message, say) {
  say("");
  const box = root.querySelector("[data-problem]");
  box.textContent = message;
  box.hidden = false;
}
