// The map of an SAE: points by WebGL, or by a plain canvas where there is none; names, hover, search, lasso.

const VERTEX = `attribute vec2 place; attribute vec4 color; uniform vec4 view; uniform float size; varying vec4 shade;
void main() { gl_Position = vec4(place * view.xy + view.zw, 0.0, 1.0); gl_PointSize = size * (color.a > 0.95 ? 1.6 : 1.0); shade = color; }`;
const FRAGMENT = `precision mediump float; varying vec4 shade;
void main() { float r = length(gl_PointCoord - 0.5); if (r > 0.5) discard; gl_FragColor = vec4(shade.rgb * shade.a, shade.a); }`;
const NONE = 65535;

export async function mount() {
  for (const box of document.querySelectorAll("[data-map]:not([data-drawn])")) {
    box.dataset.drawn = "yes";
    await draw(box);
  }
}

async function draw(box) {
  const [named, places] = [...box.querySelectorAll("script")].map((script) => JSON.parse(script.textContent));
  const names = named.map((name) => name.replaceAll("`", ""));
  const points = decode(await (await fetch(box.dataset.points)).arrayBuffer());
  const canvas = box.appendChild(document.createElement("canvas"));
  const over = box.appendChild(document.createElement("canvas"));
  canvas.setAttribute("aria-hidden", "true");
  over.setAttribute("aria-hidden", "true");
  const paint = painter(canvas, points);
  const state = { scale: 1, x: 0, y: 0, color: box.dataset.color, found: new Set(), chosen: new Set(), lasso: null, hover: -1 };
  let waiting = false;
  // Few points are drawn larger, so that a small SAE's map is not a dust of pixels.
  const base = Math.max(2.2, Math.min(6, 320 / Math.sqrt(points.n)));

  function refresh() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      const ratio = devicePixelRatio || 1;
      for (const c of [canvas, over]) {
        const [w, h] = [Math.round(box.clientWidth * ratio), Math.round(box.clientHeight * ratio)];
        if (c.width !== w || c.height !== h) [c.width, c.height] = [w, h];
      }
      paint(view(), Math.min(11, base * Math.sqrt(state.scale)) * ratio);
      overlay(over.getContext("2d"), ratio);
    });
  }

  // The map's -1..1 fills the shorter side.
  function unit() {
    const side = Math.min(box.clientWidth, box.clientHeight) * 0.48;
    return side * state.scale;
  }
  function view() {
    return [(2 * unit()) / box.clientWidth, (2 * unit()) / box.clientHeight, (2 * state.x) / box.clientWidth, (-2 * state.y) / box.clientHeight];
  }
  function toScreen(x, y) {
    return [box.clientWidth / 2 + state.x + x * unit(), box.clientHeight / 2 + state.y - y * unit()];
  }

  function recolor() {
    const style = getComputedStyle(box);
    const heat = style.getPropertyValue("--heat").trim().split(/\s+/).map(Number);
    const dark = matchMedia("(prefers-color-scheme: dark)").matches || document.documentElement.dataset.theme === "dark";
    const muted = dark ? [110, 112, 118] : [165, 160, 150];
    const searching = state.found.size || state.chosen.size;
    for (let i = 0; i < points.n; i++) {
      let rgb;
      if (state.color === "density") {
        const t = points.density[i] / 255;
        rgb = heat.map((c, k) => muted[k] + (c - muted[k]) * t * t);
      } else rgb = points.cluster[i] === NONE ? muted : hue(points.cluster[i], dark);
      const marked = state.found.has(i) || state.chosen.has(i);
      const alpha = searching ? (marked ? 1 : 0.12) : 0.72;
      points.color.set(marked ? [...heat, 255] : [rgb[0], rgb[1], rgb[2], alpha * 255], i * 4);
    }
    points.stale = true;
    refresh();
  }

  function overlay(pen, ratio) {
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, box.clientWidth, box.clientHeight);
    const style = getComputedStyle(box);
    pen.font = `600 12px ${style.fontFamily}`;
    pen.textAlign = "center";
    pen.lineWidth = 3;
    pen.strokeStyle = style.getPropertyValue("--raised");
    pen.fillStyle = style.getPropertyValue("--ink");
    const written = [];
    const order = places.map((_, i) => i).sort((a, b) => places[b][2] - places[a][2]);
    for (const i of order) {
      const [x, y] = toScreen(places[i][0], places[i][1]);
      const name = names[i].length > 34 ? `${names[i].slice(0, 33)}…` : names[i];
      const half = pen.measureText(name).width / 2 + 4;
      const clash = written.some(([a, b, h]) => Math.abs(a - x) < h + half && Math.abs(b - y) < 16);
      if (clash || x < half || x > box.clientWidth - half || y < 12 || y > box.clientHeight - 6) continue;
      written.push([x, y, half]);
      pen.strokeText(name, x, y);
      pen.fillText(name, x, y);
    }
    if (state.hover >= 0) {
      const [x, y] = toScreen(points.x[state.hover], points.y[state.hover]);
      pen.lineWidth = 2;
      pen.strokeStyle = style.getPropertyValue("--ink");
      pen.beginPath();
      pen.arc(x, y, 7, 0, 7);
      pen.stroke();
    }
    if (state.lasso) {
      pen.lineWidth = 1.5;
      pen.setLineDash([5, 4]);
      pen.strokeStyle = style.getPropertyValue("--accent");
      pen.beginPath();
      state.lasso.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
      pen.stroke();
      pen.setLineDash([]);
    }
  }

  function nearest(px, py) {
    let best = -1;
    let least = 14 * 14;
    const u = unit();
    const [cx, cy] = [box.clientWidth / 2 + state.x, box.clientHeight / 2 + state.y];
    for (let i = 0; i < points.n; i++) {
      const dx = cx + points.x[i] * u - px;
      const dy = cy - points.y[i] * u - py;
      const d = dx * dx + dy * dy;
      if (d < least) [least, best] = [d, i];
    }
    return best;
  }

  const card = box.querySelector("[data-point]");
  const cards = new Map();
  let asked;
  async function look(i) {
    if (i === state.hover) return;
    state.hover = i;
    refresh();
    clearTimeout(asked);
    if (i < 0) {
      card.hidden = true;
      return;
    }
    asked = setTimeout(async () => {
      if (!cards.has(i)) cards.set(i, await (await fetch(`${box.dataset.source}/map/${i}`)).text());
      if (state.hover !== i) return;
      card.innerHTML = cards.get(i);
      card.hidden = false;
      const [x, y] = toScreen(points.x[i], points.y[i]);
      card.style.left = `${Math.max(4, Math.min(x + 12, box.clientWidth - card.offsetWidth - 4))}px`;
      card.style.top = `${y + 14 + card.offsetHeight > box.clientHeight ? Math.max(4, y - card.offsetHeight - 12) : y + 14}px`;
    }, 60);
  }

  function zoom(by, px = box.clientWidth / 2, py = box.clientHeight / 2) {
    const scale = Math.min(80, Math.max(0.5, state.scale * by));
    const real = scale / state.scale;
    const [cx, cy] = [px - box.clientWidth / 2, py - box.clientHeight / 2];
    state.x = cx - (cx - state.x) * real;
    state.y = cy - (cy - state.y) * real;
    state.scale = scale;
    refresh();
  }

  const at = (event) => {
    const rect = box.getBoundingClientRect();
    return [event.clientX - rect.left, event.clientY - rect.top];
  };
  let drag = null;
  box.addEventListener("pointerdown", (event) => {
    if (event.button || event.target.closest("a")) return;
    const lasso = event.shiftKey || box.dataset.mode === "lasso";
    drag = { from: at(event), last: at(event), moved: 0, lasso };
    if (lasso) state.lasso = [drag.from];
    box.setPointerCapture(event.pointerId);
  });
  box.addEventListener("pointermove", (event) => {
    const here = at(event);
    if (!drag) return look(nearest(...here));
    drag.moved += Math.abs(here[0] - drag.last[0]) + Math.abs(here[1] - drag.last[1]);
    if (drag.lasso) state.lasso.push(here);
    else {
      state.x += here[0] - drag.last[0];
      state.y += here[1] - drag.last[1];
    }
    drag.last = here;
    refresh();
  });
  box.addEventListener("pointerup", (event) => {
    const ended = drag;
    drag = null;
    if (!ended) return;
    if (ended.lasso) {
      choose(state.lasso);
      state.lasso = null;
      box.dataset.mode = "";
      tools.querySelector("[data-lasso]").setAttribute("aria-pressed", "false");
    } else if (ended.moved < 5) {
      const i = nearest(...at(event));
      if (i < 0) return;
      // Without a pointer that hovers, the first touch shows what the second opens.
      if (event.pointerType === "touch" && state.hover !== i) look(i);
      else if (event.ctrlKey || event.metaKey) open(`${box.dataset.source}/${i}`);
      else location.assign(`${box.dataset.source}/${i}`);
    }
    refresh();
  });
  box.addEventListener("pointerleave", () => !drag && look(-1));
  box.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      zoom(Math.exp(-event.deltaY * 0.0016), ...at(event));
    },
    { passive: false },
  );

  const list = document.querySelector("[data-chosen]");
  function choose(line) {
    state.chosen = new Set();
    for (let i = 0; i < points.n; i++) if (inside(line, ...toScreen(points.x[i], points.y[i]))) state.chosen.add(i);
    recolor();
    list.hidden = false;
    list.replaceChildren();
    const indices = [...state.chosen];
    list.append(`${indices.length.toLocaleString("en")} ${indices.length === 1 ? "feature" : "features"} chosen`);
    if (!indices.length) return;
    const ranges = asRanges(indices);
    if (ranges.length < 12000) {
      list.append(Object.assign(document.createElement("a"), { href: `${box.dataset.source}?features=${ranges}#all`, textContent: "list them" }));
    }
    const copy = Object.assign(document.createElement("button"), { type: "button", className: "link", textContent: "copy their indices" });
    copy.onclick = async () => {
      await navigator.clipboard.writeText(indices.join(","));
      copy.textContent = "copied";
    };
    const none = Object.assign(document.createElement("button"), { type: "button", className: "link", textContent: "choose none" });
    none.onclick = () => {
      state.chosen = new Set();
      list.hidden = true;
      recolor();
    };
    list.append(copy, none);
  }

  const tools = document.querySelector("[data-map-tools]");
  tools.addEventListener("click", (event) => {
    const target = event.target.closest("button, a");
    if (!target) return;
    if (target.dataset.zoom) zoom(Number(target.dataset.zoom));
    if (target.matches("[data-whole]")) {
      Object.assign(state, { scale: 1, x: 0, y: 0 });
      refresh();
    }
    if (target.matches("[data-lasso]")) {
      const on = box.dataset.mode !== "lasso";
      box.dataset.mode = on ? "lasso" : "";
      target.setAttribute("aria-pressed", String(on));
    }
    if (target.dataset.color) {
      event.preventDefault();
      state.color = target.dataset.color;
      tools.querySelectorAll("[data-color]").forEach((a) => a.toggleAttribute("aria-current", false));
      target.setAttribute("aria-current", "true");
      remember();
      recolor();
    }
  });
  const field = tools.querySelector("[name=q]");
  const says = tools.querySelector("[data-found]");
  let typing;
  async function search() {
    const q = field.value.trim();
    const found = q ? await (await fetch(`${box.dataset.source}/map/found?q=${encodeURIComponent(q)}`)).json() : [];
    if (q !== field.value.trim()) return;
    state.found = new Set(found);
    says.textContent = q ? `${found.length.toLocaleString("en")} found` : "";
    remember();
    recolor();
  }
  function remember() {
    const address = new URL(location.href);
    state.color === "cluster" ? address.searchParams.delete("color") : address.searchParams.set("color", state.color);
    field.value.trim() ? address.searchParams.set("q", field.value.trim()) : address.searchParams.delete("q");
    history.replaceState(history.state, "", address);
  }
  field.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(search, 250);
  });
  tools.addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  new ResizeObserver(refresh).observe(box);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolor);
  recolor();
  if (field.value) search();
  box.dataset.ready = "yes";
}

function decode(buffer) {
  const n = new DataView(buffer).getUint32(0, true);
  const short = (k) => new Uint16Array(buffer.slice(4 + 2 * n * k, 4 + 2 * n * (k + 1)));
  const place = new Float32Array(2 * n);
  const [xs, ys] = [short(0), short(1)];
  const [x, y] = [new Float32Array(n), new Float32Array(n)];
  for (let i = 0; i < n; i++) {
    place[2 * i] = x[i] = (xs[i] / 65535) * 2 - 1;
    place[2 * i + 1] = y[i] = (ys[i] / 65535) * 2 - 1;
  }
  return { n, x, y, place, cluster: short(2), density: new Uint8Array(buffer, 4 + 6 * n), color: new Uint8Array(4 * n), stale: true };
}

function painter(canvas, points) {
  const gl = canvas.getContext("webgl", { antialias: true, premultipliedAlpha: true });
  return gl ? byWebgl(gl, canvas, points) : byCanvas(canvas, points);
}

function byWebgl(gl, canvas, points) {
  const program = gl.createProgram();
  for (const [kind, source] of [
    [gl.VERTEX_SHADER, VERTEX],
    [gl.FRAGMENT_SHADER, FRAGMENT],
  ]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  gl.useProgram(program);
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  const buffers = [gl.createBuffer(), gl.createBuffer()];
  gl.bindBuffer(gl.ARRAY_BUFFER, buffers[0]);
  gl.bufferData(gl.ARRAY_BUFFER, points.place, gl.STATIC_DRAW);
  const place = gl.getAttribLocation(program, "place");
  gl.enableVertexAttribArray(place);
  gl.vertexAttribPointer(place, 2, gl.FLOAT, false, 0, 0);
  gl.bindBuffer(gl.ARRAY_BUFFER, buffers[1]);
  const color = gl.getAttribLocation(program, "color");
  gl.enableVertexAttribArray(color);
  gl.vertexAttribPointer(color, 4, gl.UNSIGNED_BYTE, true, 0, 0);
  return (view, size) => {
    gl.viewport(0, 0, canvas.width, canvas.height);
    if (points.stale) {
      gl.bindBuffer(gl.ARRAY_BUFFER, buffers[1]);
      gl.bufferData(gl.ARRAY_BUFFER, points.color, gl.DYNAMIC_DRAW);
      points.stale = false;
    }
    gl.uniform4f(gl.getUniformLocation(program, "view"), ...view);
    gl.uniform1f(gl.getUniformLocation(program, "size"), size);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.drawArrays(gl.POINTS, 0, points.n);
  };
}

function byCanvas(canvas, points) {
  const pen = canvas.getContext("2d");
  return (view, size) => {
    pen.clearRect(0, 0, canvas.width, canvas.height);
    const c = points.color;
    for (let i = 0; i < points.n; i++) {
      const x = ((points.x[i] * view[0] + view[2] + 1) / 2) * canvas.width;
      const y = ((1 - points.y[i] * view[1] - view[3]) / 2) * canvas.height;
      if (x < 0 || y < 0 || x > canvas.width || y > canvas.height) continue;
      pen.fillStyle = `rgba(${c[4 * i]},${c[4 * i + 1]},${c[4 * i + 2]},${c[4 * i + 3] / 255})`;
      pen.fillRect(x - size / 2, y - size / 2, size, size);
    }
  };
}

// Neighbouring numbers get far apart hues.
function hue(number, dark) {
  const h = (number * 137.508) % 360;
  const [s, l] = dark ? [0.55, 0.62] : [0.55, 0.42];
  const f = (n) => {
    const k = (n + h / 30) % 12;
    return 255 * (l - s * Math.min(l, 1 - l) * Math.max(-1, Math.min(k - 3, 9 - k, 1)));
  };
  return [f(0), f(8), f(4)];
}

function inside(line, x, y) {
  let odd = false;
  for (let i = 0, j = line.length - 1; i < line.length; j = i++) {
    const [[xi, yi], [xj, yj]] = [line[i], line[j]];
    if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) odd = !odd;
  }
  return odd;
}

function asRanges(indices) {
  const runs = [];
  for (const i of indices.sort((a, b) => a - b)) {
    if (runs.length && runs.at(-1)[1] === i - 1) runs.at(-1)[1] = i;
    else runs.push([i, i]);
  }
  return runs.map(([a, b]) => (a === b ? a : `${a}-${b}`)).join(",");
}
