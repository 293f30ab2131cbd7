// Conversations: a history each for the default and the steered text; every turn can be edited or made again.

export class Chat {
  constructor(root, generate) {
    this.root = root;
    this.generate = generate;
    this.said = { default: [], steered: [] };
    this.shown = Infinity; // Turns from here on stand in the streams, not above them.
    const box = root.querySelector("[data-message]");
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        root.querySelector("[data-form]").requestSubmit();
      }
    });
    root.querySelector("[data-streams]").addEventListener("click", (event) => this.click(event.target.closest("button")));
  }
  get on() {
    return this.root.dataset.chat === "yes";
  }
  load(asked) {
    this.said = { default: [...(asked.defaultChatMessages ?? [])], steered: [...(asked.steeredChatMessages ?? [])] };
    this.shown = Infinity;
    this.draw();
  }
  // Take what was typed into both histories; false when there is nothing to answer.
  send() {
    const box = this.root.querySelector("[data-message]");
    const content = box.value.trim();
    if (content) for (const list of Object.values(this.said)) list.push({ role: "user", content });
    box.value = "";
    this.draw();
    if (!content) this.cut(this.said.default.findLastIndex((m) => m.role === "user") + 1);
    return this.said.default.length > 0;
  }
  cut(n) {
    for (const name of Object.keys(this.said)) this.said[name] = this.said[name].slice(0, n);
    this.draw();
  }
  // The texts become turns; they stay where they have been written, with the tokens that can be pointed at.
  took(texts) {
    this.shown = this.said.default.length;
    for (const [name, list] of Object.entries(this.said)) list.push({ role: "assistant", content: texts[name] ?? "" });
    this.draw();
  }
  begin() {
    this.shown = Infinity;
    this.draw();
  }
  click(button) {
    if (!button?.dataset.turn) return;
    const [name, n] = [button.closest("[data-column]").dataset.column, Number(button.dataset.turn)];
    if (button.dataset.do === "again") {
      this.cut(n);
      this.generate();
    }
    if (button.dataset.do === "edit") {
      this.begin();
      const column = this.root.querySelector(`[data-column="${name}"]`);
      this.edit(name, n, column.querySelectorAll(".turn")[n]);
      // The last answer is a turn now.
      this.root.querySelectorAll(".stream").forEach((stream) => stream.replaceChildren());
    }
  }
  edit(name, n, turn) {
    const box = document.createElement("textarea");
    box.value = this.said[name][n].content;
    box.rows = 3;
    box.setAttribute("aria-label", "Edit this turn; Enter sends it");
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.draw();
      event.stopPropagation();
      if (event.key !== "Enter" || event.shiftKey) return;
      event.preventDefault();
      const { role } = this.said[name][n];
      const other = name === "default" ? "steered" : "default";
      const kept = this.said[other][n];
      this.cut(n);
      this.said[name].push({ role, content: box.value });
      this.said[other].push(kept);
      this.draw();
      if (role === "user") this.generate();
    });
    turn.replaceChildren(box);
    box.focus();
  }
  draw() {
    for (const [name, list] of Object.entries(this.said)) {
      const column = this.root.querySelector(`[data-column="${name}"]`);
      column.querySelector("[data-turns]").replaceChildren(...(this.on ? list.slice(0, this.shown).map((m, n) => this.turn(m, n)) : []));
      column.querySelector("[data-last]").replaceChildren(...(this.on && this.shown < list.length ? this.buttons(list[this.shown], this.shown) : []));
    }
  }
  turn(message, n) {
    const turn = Object.assign(document.createElement("div"), { className: `turn ${message.role}` });
    turn.append(Object.assign(document.createElement("p"), { textContent: message.content }), ...this.buttons(message, n));
    return turn;
  }
  buttons(message, n) {
    const button = (what, words) => {
      const made = Object.assign(document.createElement("button"), { type: "button", className: "link", textContent: words });
      Object.assign(made.dataset, { turn: n, do: what });
      return made;
    };
    return message.role === "assistant" ? [button("edit", "edit"), " ", button("again", "regenerate")] : [button("edit", "edit")];
  }
}
