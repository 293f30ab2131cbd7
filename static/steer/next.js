// How the likeliest next tokens move with the sliders: one request at a time, the newest wins.

import { post } from "./api.js";

export function mountNext(root, asked) {
  const view = root.querySelector("[data-next-view]");
  const status = view.querySelector("[data-next-status]");
  let busy = false;
  let again = false;
  async function look() {
    if (!view.open) return;
    again = busy;
    if (busy) return;
    busy = true;
    try {
      do {
        again = false;
        const body = asked();
        if (body.prompt === undefined && !body.steeredChatMessages.length) break;
        const answer = await post("/api/steer/next", { ...body, controls: [], n_samples: 1, n_top: 8 });
        show(view.querySelector("[data-next-rows]"), answer.tokens);
        status.textContent = `One forward pass, ${answer.ms} ms.`;
      } while (again);
    } catch (error) {
      status.textContent = error.message;
    } finally {
      busy = false;
    }
  }
  view.addEventListener("toggle", look);
  return look;
}

function show(body, tokens) {
  body.replaceChildren(
    ...tokens.map((t) => {
      const row = document.createElement("tr");
      const [before, after] = [Math.exp(t.default), Math.exp(t.steered)];
      row.insertCell().append(Object.assign(document.createElement("code"), { className: "chip", textContent: t.token.replaceAll("\n", "↵") || "⋯" }));
      for (const p of [before, after]) row.insertCell().textContent = `${(100 * p).toFixed(2)} %`;
      const change = row.insertCell();
      change.textContent = `${after >= before ? "+" : "−"}${(100 * Math.abs(after - before)).toFixed(2)}`;
      for (const cell of [...row.cells].slice(1)) cell.className = "n";
      return row;
    }),
  );
}
