// Forms that send files: by choice or drop, progress while they go up, the server's sentence if it refuses.

const mib = (bytes) => (bytes < 2 ** 19 ? `${Math.ceil(bytes / 1024)} KiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`);

export function mount() {
  const form = document.querySelector("[data-upload]");
  if (form.dataset.mounted) return;
  form.dataset.mounted = "yes";
  const part = (name) => document.querySelector(`[data-${name}]`);
  const { wanted, nothing, working, limitName } = form.dataset;
  let files = [];

  function choose(list) {
    files = [...list].filter((file) => new RegExp(wanted).test(file.name));
    const names = files.slice(0, 12).map((file) => `${file.name} (${mib(file.size)})`).join(", ");
    part("chosen").textContent = files.length > 12 ? `${names} and ${files.length - 12} more` : names || nothing;
  }

  form.addEventListener("change", (event) => {
    if (event.target.type !== "file") return;
    form.querySelectorAll("input[type=file]").forEach((input) => input !== event.target && (input.value = ""));
    choose(event.target.files);
  });
  // Files chosen before this script arrived, or kept by the browser over a reload.
  form.querySelectorAll("input[type=file]").forEach((input) => input.files.length && choose(input.files));
  const drop = part("drop");
  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.dataset.over = "yes";
  });
  drop.addEventListener("dragleave", (event) => drop.contains(event.relatedTarget) || delete drop.dataset.over);
  drop.addEventListener("drop", async (event) => {
    event.preventDefault();
    delete drop.dataset.over;
    form.querySelectorAll("input[type=file]").forEach((input) => (input.value = ""));
    const dropped = [...event.dataTransfer.files];
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    choose(entries.length ? (await Promise.all(entries.map(filesOf))).flat() : dropped);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    part("problem").replaceChildren();
    const size = files.reduce((sum, file) => sum + file.size, 0);
    const limit = Number(form.dataset.limit);
    if (!files.length) return say("Choose its files first.");
    if (size > limit) return say(`These files take ${mib(size)}; ${limitName} allows ${mib(limit)}.`);
    send(size);
  });

  function send(size) {
    const body = new FormData(form);
    body.delete("files");
    // Some formats say where they read in the names of their folders alone.
    files.forEach((file) => body.append("files", file, file.path ?? (file.webkitRelativePath || file.name)));
    const request = new XMLHttpRequest();
    const bar = part("progress");
    request.open("POST", form.action);
    request.responseType = "json";
    request.setRequestHeader("accept", "application/json");
    request.upload.addEventListener("progress", (event) => {
      bar.hidden = false;
      bar.value = (100 * event.loaded) / event.total;
      part("status").textContent =
        event.loaded < event.total ? `${mib(event.loaded)} of ${mib(event.total)}` : working;
    });
    request.addEventListener("load", () => {
      if (request.status === 200 && request.response?.url) return location.assign(request.response.url);
      end(request.response?.message ?? `The server answered with status ${request.status}.`);
    });
    request.addEventListener("error", () => end("The connection broke; is the server running? Nothing was kept."));
    form.querySelector("button").disabled = true;
    request.send(body);
  }

  function end(sentence) {
    form.querySelector("button").disabled = false;
    part("progress").hidden = true;
    part("status").textContent = "";
    say(sentence);
  }

  function say(sentence) {
    const box = document.createElement("div");
    box.className = "problem";
    box.setAttribute("role", "alert");
    box.textContent = sentence;
    part("problem").replaceChildren(box);
  }
}

// All files of a dropped file or folder.
async function filesOf(entry) {
  if (entry.isFile) {
    const file = await new Promise((done, failed) => entry.file(done, failed));
    return [Object.assign(file, { path: entry.fullPath.slice(1) })];
  }
  const reader = entry.createReader();
  const entries = await new Promise((done, failed) => reader.readEntries(done, failed));
  return (await Promise.all(entries.map(filesOf))).flat();
}
