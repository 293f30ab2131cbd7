// Texts as tokens: shades, and the alternatives of the one that is pointed at.

let tip;
const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(Math.exp(logprob) < 0.01 ? 2 : 1)} %`;
const visible = (token) => token.replaceAll("\n", "↵").replaceAll("\t", "⇥") || "⋯";

export class Text {
  constructor(root, key, place) {
    Object.assign(this, { root, key, place, tokens: [], score: undefined });
  }
  add(entry) {
    const span = document.createElement("span");
    span.className = "tok";
    span.tabIndex = this.tokens.length ? -1 : 0;
    span.textContent = entry.text ?? entry.token;
    this.tokens.push({ ...entry, span });
    span.token = { of: this, n: this.tokens.length - 1 };
    this.place.append(span);
  }
  // `by`: nothing, "change", or the number of a feature.
  shade(by) {
    const values = this.tokens.map((_, n) => this.value(by, n));
    const most = Math.max(...values.map(Math.abs), by === "change" ? 1 : 1e-6);
    this.tokens.forEach(({ span }, n) => {
      const level = Math.min(10, Math.round((10 * Math.abs(values[n])) / most));
      span.className = `tok${level ? ` a${level}` : ""}${values[n] < 0 ? " down" : ""}`;
    });
  }
  value(by, n) {
    if (!this.score || by === "") return 0;
    if (by === "change") return this.score.steered[n] - this.score.default[n];
    return this.score.activations[Number(by)]?.[n] ?? 0;
  }
}

export function mountTokens(root) {
  const streams = root.querySelector("[data-streams]");
  for (const kind of ["pointerover", "focusin"]) streams.addEventListener(kind, (event) => point(event.target));
  for (const kind of ["pointerleave", "focusout"]) streams.addEventListener(kind, away);
  streams.addEventListener("keydown", (event) => {
    const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    if (!event.target.token) return;
    if (event.key === "Escape") away();
    const next = step && event.target[step];
    if (!next?.token) return;
    event.preventDefault();
    event.stopPropagation();
    next.focus();
  });
}

function away() {
  tip?.remove();
  tip = undefined;
}

function point(span) {
  away();
  if (!span.token) return;
  const { of, n } = span.token;
  const token = of.tokens[n];
  tip = document.createElement("div");
  tip.className = "tip alternatives";
  tip.setAttribute("role", "tooltip");
  const head = document.createElement("p");
  head.textContent = `“${visible(token.token)}”`;
  tip.append(head);
  const columns = of.score
    ? [["default", of.score.topDefault[n], of.score.default[n]], ["steered", of.score.topSteered[n], of.score.steered[n]]]
    : [[of.key.split("#")[0], (token.top_logprobs ?? []).map((o) => [o.token, o.logprob]), token.logprob]];
  for (const [name, list, own] of columns) tip.append(column(name, list, own));
  (of.score?.activations ?? []).forEach((acts, f) => {
    if (acts[n] > 0) tip.append(Object.assign(document.createElement("p"), { textContent: `${of.names?.[f] ?? `feature ${f + 1}`}: ${acts[n].toPrecision(3)}` }));
  });
  document.body.append(tip);
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const wide = document.documentElement.clientWidth;
  tip.style.left = `${Math.max(4, Math.min(box.left + scrollX, wide - tip.offsetWidth - 4))}px`;
  const above = box.top - tip.offsetHeight - 6;
  tip.style.top = `${(above > 0 ? above : box.bottom + 6) + scrollY}px`;
}

function column(name, list, own) {
  const table = document.createElement("table");
  table.createCaption().textContent = `${name}: ${percent(own)}`;
  for (const [token, logprob] of list ?? []) {
    const line = table.insertRow();
    line.insertCell().textContent = visible(token);
    line.insertCell().textContent = percent(logprob);
  }
  return table;
}
