// Waits until a model and SAEs are in the worker's memory, and shows how far their loading is: the part that
// POST /{model}/loading answers with. Throws the server's sentence, or AbortError.

export async function ready(model, sources, box, signal) {
  const query = new URLSearchParams(sources.map((source) => ["source", source]));
  try {
    for (;;) {
      const response = await fetch(`/${model}/loading?${query}`, {
        method: "POST",
        headers: { "hx-request": "true" },
        signal,
      });
      if (response.status === 204) return;
      const part = new DOMParser().parseFromString(await response.text(), "text/html").body;
      if (!response.ok) throw new Error(part.textContent.trim());
      box.replaceChildren(...part.childNodes);
      box.hidden = false;
      await new Promise((done) => setTimeout(done, 300));
    }
  } finally {
    box.hidden = true;
    box.replaceChildren();
  }
}
