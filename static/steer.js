// The steering page: what is asked for, and the texts as they come.

import { ready } from "./loading.js";
import { post, stream } from "./steer/api.js";
import { Chat } from "./steer/chat.js";
import { add, mountFeatures, number, steeredFeatures } from "./steer/features.js";
import { mountNext } from "./steer/next.js";
import { mountPlots, mountSweep } from "./steer/sweep.js";
import { mountTokens, Text } from "./steer/tokens.js";

const WORDS = { default: "Default", steered: "Steered", random_direction: "Random direction", random_feature: "Another feature" };

export function mount() {
  mountPlots();
  const root = document.querySelector("[data-steer]");
  if (!root || root.dataset.mounted) return;
  root.dataset.mounted = "yes";
  new Lab(root);
}

class Lab {
  constructor(root) {
    this.root = root;
    this.form = root.querySelector("[data-form]");
    this.texts = new Map();
    this.chat = new Chat(root, () => this.generate());
    const asked = () => this.asked();
    this.look = mountNext(root, asked);
    const sweepable = mountSweep(root, asked);
    const changed = () => {
      this.look();
      sweepable();
    };
    mountFeatures(root, changed);
    mountTokens(root);
    this.form.addEventListener("input", () => this.look());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!this.chat.on || this.chat.send()) this.generate();
      else this.say("Write a message first.");
    });
    this.form.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && root.dataset.running) this.run?.abort();
    });
    root.addEventListener("click", (event) => this.click(event.target.closest("button")));
    root.querySelector("[data-shade-by]").addEventListener("change", () => this.shade());
    root.querySelector("[data-preset]").addEventListener("submit", (event) => this.keep(event));
    root.querySelector("[data-difference]").addEventListener("submit", (event) => this.difference(event));
    root.querySelector("[data-upload-vector]").addEventListener("submit", (event) => this.upload(event));
    const saved = JSON.parse(root.querySelector("[data-saved]").textContent);
    if (this.chat.on) this.chat.load(saved.asked);
    this.mode(root.dataset.chat === "yes" ? "chat" : "text");
    if (saved.id && saved.run.rows) this.replay(saved);
  }

  click(button) {
    if (!button) return;
    if (button.matches("[data-stop]")) this.run?.abort();
    if (button.matches("[data-mode]")) this.mode(button.dataset.mode);
    if (button.matches("[data-reseed]")) {
      this.form.seed.value = Math.floor(Math.random() * 1e6);
      this.form.requestSubmit();
    }
    if (button.matches("[data-forget]")) this.forget(button);
  }

  mode(name) {
    this.root.dataset.chat = name === "chat" ? "yes" : "";
    this.root.querySelectorAll("[data-mode]").forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.mode === name)));
    this.form.prompt.hidden = name === "chat";
    this.root.querySelector("[data-say]").hidden = name !== "chat";
    if (name === "chat" && !this.chat.said.default.length) this.root.querySelector("[data-spare]").checked = true;
    this.chat.draw();
    this.look?.();
  }

  asked() {
    const form = this.form;
    const said = this.chat.said;
    const common = {
      modelId: this.root.dataset.model,
      features: steeredFeatures(this.root),
      strength_multiplier: number(this.root.querySelector("[data-multiplier]")),
      off: steeredFeatures(this.root, false),
      stop: form.stop.value.split("\n").filter(Boolean).map(unescaped),
      steer_special_tokens: !form.spare.checked,
      controls: [...form.querySelectorAll('[name="controls"]:checked')].map((box) => box.value),
      n_logprobs: 5,
    };
    for (const name of ["temperature", "n_tokens", "seed", "n_samples", "top_p", "top_k", "min_p", "repetition_penalty", "freq_penalty"]) common[name] = number(form[name]);
    return this.chat.on ? { ...common, defaultChatMessages: said.default, steeredChatMessages: said.steered } : { ...common, prompt: form.prompt.value };
  }

  async generate() {
    this.run?.abort();
    const run = (this.run = new AbortController());
    const body = this.asked();
    const began = performance.now();
    let n = 0;
    this.problem("");
    this.clear(body);
    this.root.querySelector("[data-share]").hidden = true;
    this.root.querySelector("[data-stop]").hidden = false;
    this.root.dataset.running = "yes";
    this.address(body);
    try {
      const sources = body.features.map((f) => f.layer).filter((layer) => !layer.endsWith("-vectors"));
      await ready(body.modelId, sources, this.root.querySelector("[data-loading]"), run.signal);
      this.say("Waiting for the first token…");
      for await (const event of stream("/api/steer/stream", body, run.signal)) {
        if (event.event === "error") throw new Error(event.message);
        if (event.event === "queued") this.say(event.place ? `Place ${event.place} in the queue…` : "Let in…");
        if (event.event === "token") {
          this.text(event.row, event.sample, body).add(event);
          n += 1;
          const seconds = (performance.now() - began) / 1000;
          this.say(`${n} tokens in ${seconds.toFixed(1)} s`);
        }
        if (event.event === "end") await this.ended(event, body, run.signal);
      }
    } catch (error) {
      if (this.run !== run) return;
      if (error.name === "AbortError") {
        this.say(`Stopped after ${n} tokens.`);
        if (body.prompt === undefined && n) this.answered();
      } else {
        this.say("");
        this.problem(error.message);
      }
    } finally {
      if (this.run === run) {
        this.root.querySelector("[data-stop]").hidden = true;
        delete this.root.dataset.running;
      }
    }
  }

  async ended(event, body, signal) {
    delete this.root.dataset.running;
    this.root.querySelector("[data-stop]").hidden = true;
    const link = this.root.querySelector("[data-share] a");
    link.href = link.textContent = event.shareUrl;
    this.root.querySelector("[data-share] span")?.remove();
    this.root.querySelector("[data-share]").hidden = false;
    if (body.prompt === undefined) this.answered();
    await this.score(event.id, body.features, signal);
  }

  // What stands in the streams becomes the conversation's next turn.
  answered() {
    const whole = (name) => this.texts.get(`${name}#0`)?.tokens.map((t) => t.text ?? t.token).join("") ?? "";
    this.chat.took({ default: whole("default"), steered: whole("steered") });
    this.look();
  }

  // Read the texts again with and without steering; the tokens can be shaded then.
  async score(id, features, signal) {
    const status = this.root.querySelector("[data-shade-status]");
    this.root.querySelector("[data-shade]").hidden = false;
    status.textContent = "Reading the texts once more…";
    try {
      const answer = await post("/api/steer/score", { id }, signal);
      const scored = features.map((f) => `${f.layer}/${f.index}`).filter((_, n) => answer.features[n]);
      for (const row of answer.rows) {
        const text = this.texts.get(`${row.name}#${row.sample}`);
        if (text) Object.assign(text, { score: row, names: scored });
      }
      this.shades(scored);
      status.textContent = "Point at a token for its alternatives in both.";
    } catch (error) {
      if (!signal?.aborted) status.textContent = error.message;
    }
  }

  shades(scored) {
    const select = this.root.querySelector("[data-shade-by]");
    const chosen = select.value;
    select.replaceChildren(new Option("nothing", ""), new Option("change of log-probability by steering", "change"), ...scored.map((name, n) => new Option(`activation of ${name}`, n)));
    select.value = [...select.options].some((o) => o.value === chosen) && chosen ? chosen : scored.length ? "0" : "change";
    this.shade();
  }

  shade() {
    for (const text of this.texts.values()) text.shade(this.root.querySelector("[data-shade-by]").value);
  }

  replay(saved) {
    this.clear(saved.asked);
    for (const row of saved.run.rows) {
      const text = this.text(row.name, row.sample, saved.asked);
      row.tokens.forEach((token) => text.add(token));
    }
    if (this.chat.on) this.answered();
    this.score(saved.id, saved.asked.features);
  }

  clear(body) {
    this.texts.clear();
    this.root.querySelector("[data-shade]").hidden = true;
    this.root.querySelectorAll("[data-extra]").forEach((section) => section.remove());
    this.chat.begin();
    for (const name of ["default", "steered"]) {
      const stream = this.root.querySelector(`[data-${name}]`);
      stream.replaceChildren(...(body.prompt === undefined || body.prompt === null ? [] : [before(body.prompt)]));
    }
    for (const control of body.controls ?? []) this.section(control);
    for (const name of ["default", "steered", ...(body.controls ?? [])]) for (let n = 0; n < (body.n_samples ?? 1); n += 1) this.text(name, n, body);
  }

  section(name) {
    const section = document.createElement("section");
    section.dataset.extra = name;
    section.append(Object.assign(document.createElement("h2"), { textContent: WORDS[name] ?? name }));
    this.root.querySelector("[data-streams]").append(section);
    return section;
  }

  text(name, sample, body) {
    const key = `${name}#${sample}`;
    if (!this.texts.has(key)) this.texts.set(key, new Text(this.root, key, this.place(name, sample, body)));
    return this.texts.get(key);
  }

  place(name, sample, body) {
    const first = this.root.querySelector(`[data-${name}]`);
    if (first && sample === 0) return first;
    const section = this.root.querySelector(`[data-column="${name}"]`) ?? this.root.querySelector(`[data-extra="${name}"]`) ?? this.section(name);
    const made = Object.assign(document.createElement("p"), { className: "stream" });
    if (typeof body.prompt === "string") made.append(before(body.prompt));
    if (sample > 0 && section.dataset.column) made.dataset.extra = name;
    section.append(made);
    return made;
  }

  // The address holds what was asked, so that it can be sent to somebody or come back to.
  address(body) {
    if (body.prompt === undefined) return;
    const query = new URLSearchParams();
    for (const [features, off] of [[body.features, ""], [body.off, ":off"]])
      for (const f of features) {
        const at = f.at.join(",") + off;
        query.append("feature", `${f.layer}:${f.index}:${f.strength}:${f.operation}:${f.positions}${at && `:${at}`}`);
      }
    for (const name of ["temperature", "n_tokens", "seed", "freq_penalty", "repetition_penalty", "top_p", "top_k", "min_p", "n_samples"]) query.set(name, body[name]);
    for (const name of ["stop", "controls"]) for (const one of body[name]) query.append(name, one);
    if (!body.steer_special_tokens) query.set("spare", "yes");
    query.set("multiplier", body.strength_multiplier);
    query.set("text", body.prompt);
    const path = `/${this.root.dataset.model}/steer?${query}`;
    if (path.length < 4000) history.replaceState(null, "", path);
  }

  async keep(event) {
    event.preventDefault();
    const form = event.target;
    await this.trying(async () => {
      const body = this.asked();
      const made = await post("/api/steer/presets", { modelId: body.modelId, name: form.elements.name.value, settings: body });
      const list = this.root.querySelector("[data-presets]");
      list.querySelector(".muted")?.remove();
      if (!list.querySelector(`[data-forget="${made.id}"]`)) {
        const item = document.createElement("li");
        item.append(Object.assign(document.createElement("a"), { href: made.url, textContent: made.name }), " ");
        const forget = Object.assign(document.createElement("button"), { type: "button", className: "link", textContent: "delete" });
        forget.dataset.forget = made.id;
        forget.setAttribute("aria-label", `Delete preset ${made.name}`);
        item.append(forget);
        list.append(item);
      }
      form.reset();
    });
  }

  async forget(button) {
    await this.trying(async () => {
      await post("/api/steer/presets/delete", { modelId: this.root.dataset.model, id: button.dataset.forget });
      button.closest("li").remove();
    });
  }

  async difference(event) {
    event.preventDefault();
    const form = event.target.elements;
    const lines = (field) => field.value.split("\n").filter((line) => line.trim());
    await this.trying(async () => {
      const body = { modelId: this.root.dataset.model, layerNumber: number(form.layer), plus: lines(form.plus), minus: lines(form.minus), lastTokenOnly: form.last.checked, vectorLabel: form.label.value };
      this.made((await post("/api/vector/difference", body)).vector);
    });
  }

  async upload(event) {
    event.preventDefault();
    const form = event.target.elements;
    await this.trying(async () => {
      const read = JSON.parse(await form.file.files[0].text());
      const vector = Array.isArray(read) ? read : (read.vector ?? read.values);
      const body = { modelId: this.root.dataset.model, layerNumber: number(form.layer), hookType: "hook_resid_post", vector, vectorLabel: form.label.value };
      this.made((await post("/api/vector/new", body)).vector);
    });
  }

  made(vector) {
    const strength = vector.defaultSteerStrength;
    const feature = { source: vector.source, index: vector.index, label: vector.label, strength, reach: Math.max(20, 4 * Math.abs(strength)), max: 0, vector: true };
    this.root.querySelector("[data-no-vectors]")?.remove();
    const item = document.createElement("li");
    const button = Object.assign(document.createElement("button"), { type: "button", className: "choice", textContent: `${vector.source}/${vector.index} ${vector.label}` });
    button.dataset.add = JSON.stringify(feature);
    item.append(button);
    this.root.querySelector("[data-vectors]").append(item);
    add(this.root, feature);
    this.look();
  }

  async trying(act) {
    this.problem("");
    try {
      await act();
    } catch (error) {
      this.problem(error.message);
    }
  }

  say(words) {
    this.root.querySelector("[data-status]").textContent = words;
  }

  problem(words) {
    const box = this.root.querySelector("[data-problem]");
    box.textContent = words;
    box.hidden = !words;
  }
}

function before(prompt) {
  return Object.assign(document.createElement("span"), { className: "muted", textContent: prompt });
}

// A stop string as it is typed: \n is a line break.
function unescaped(line) {
  return line.replace(/\\([nt\\])/g, (_, letter) => ({ n: "\n", t: "\t", "\\": "\\" })[letter]);
}
