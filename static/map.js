// The map of an SAE: points by WebGL, or by a plain canvas where there is none; names, hover, search, lasso.

const VERTEX = `attribute vec2 place; attribute vec4 color; uniform vec4 view; uniform float size; varying vec4 shade;
void main() { gl_Position = vec4(place * view.xy + view.zw, 0.0, 1.0); gl_PointSize = size * (color.a > 0.95 ? 1.6 : 1.0); shade = color; }`;
const FRAGMENT = `precision mediump float; varying vec4 shade;
void main() { float r = length(gl_PointCoord - 0.5); if (r > 0.5) discard; gl_FragColor = vec4(shade.rgb * shade.a, shade.a); }`;
const FULL = 65535;
// A line has no more corners than this, which keeps its address short.
const CORNERS = 160;

export async function mount() {
  for (const box of document.querySelectorAll("[data-map]:not([data-drawn])")) {
    box.dataset.drawn = "yes";
    await draw(box);
  }
}

async function draw(box) {
  const [named, places] = [...box.querySelectorAll("script")].map((script) => JSON.parse(script.textContent));
  const names = named.map((name) => name.replaceAll("`", "")).map((name) => (name.length > 34 ? `${name.slice(0, 33)}…` : name));
  const largestFirst = places.map((_, i) => i).sort((a, b) => places[b][2] - places[a][2]);
  const points = decode(await (await fetch(box.dataset.points)).arrayBuffer());
  // Three layers, each drawn again only when what it shows has changed: a moving pointer redraws one ring, not all points.
  const [canvas, naming, marking] = ["points", "names", "marks"].map((name) => {
    const layer = box.appendChild(document.createElement("canvas"));
    layer.dataset.layer = name;
    layer.setAttribute("aria-hidden", "true");
    return layer;
  });
  const paint = painter(canvas, points);
  const state = { scale: 1, x: 0, y: 0, color: box.dataset.color, found: new Set(), chosen: new Set(), line: "", lasso: null, hover: -1 };
  const stale = new Set();
  // Few points are drawn larger, so that a small SAE's map is not a dust of pixels.
  const base = Math.max(2.2, Math.min(6, 320 / Math.sqrt(points.n)));
  let [width, height] = [box.clientWidth, box.clientHeight];
  let widths = [];

  function refresh(...layers) {
    if (!stale.size) requestAnimationFrame(redraw);
    for (const layer of layers.length ? layers : ["points", "names", "marks"]) stale.add(layer);
  }

  function redraw() {
    const ratio = devicePixelRatio || 1;
    [width, height] = [box.clientWidth, box.clientHeight];
    for (const c of [canvas, naming, marking]) {
      const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
      if (c.width !== w || c.height !== h) {
        [c.width, c.height] = [w, h];
        stale.add("points").add("names").add("marks");
      }
    }
    if (stale.has("points")) paint(view(), Math.min(11, base * Math.sqrt(state.scale)) * ratio);
    if (stale.has("names")) writeNames(fresh(naming, ratio));
    if (stale.has("marks")) mark(fresh(marking, ratio));
    stale.clear();
  }

  function fresh(layer, ratio) {
    const pen = layer.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    return pen;
  }

  // The map's -1..1 fills the shorter side.
  const unit = () => Math.min(width, height) * 0.48 * state.scale;
  function view() {
    return [(2 * unit()) / width, (2 * unit()) / height, (2 * state.x) / width, (-2 * state.y) / height];
  }
  function toScreen(x, y) {
    return [width / 2 + state.x + x * unit(), height / 2 + state.y - y * unit()];
  }
  function toMap([px, py]) {
    return [(px - width / 2 - state.x) / unit(), (height / 2 + state.y - py) / unit()].map((c) => Math.round(((Math.max(-1, Math.min(1, c)) + 1) / 2) * FULL));
  }

  function recolor() {
    const heat = getComputedStyle(box).getPropertyValue("--heat").trim().split(/\s+/).map(Number);
    const dark = matchMedia("(prefers-color-scheme: dark)").matches || document.documentElement.dataset.theme === "dark";
    const muted = dark ? [110, 112, 118] : [165, 160, 150];
    const byDensity = state.color === "density";
    const which = byDensity ? points.density : points.cluster;
    const shades = byDensity
      ? Array.from({ length: 256 }, (_, level) => heat.map((c, k) => muted[k] + (c - muted[k]) * (level / 255) ** 2))
      : places.map((_, number) => hue(number, dark));
    const searching = state.found.size || state.chosen.size;
    const alpha = 255 * (searching ? 0.12 : 0.72);
    const { color } = points;
    for (let i = 0; i < points.n; i++) {
      const rgb = shades[which[i]] ?? muted;
      color[4 * i] = rgb[0];
      color[4 * i + 1] = rgb[1];
      color[4 * i + 2] = rgb[2];
      color[4 * i + 3] = alpha;
    }
    for (const i of [...state.found, ...state.chosen]) color.set([...heat, 255], 4 * i);
    points.stale = true;
    widths = [];
    refresh();
  }

  function writeNames(pen) {
    const style = getComputedStyle(box);
    pen.font = `600 12px ${style.fontFamily}`;
    pen.textAlign = "center";
    pen.lineWidth = 3;
    pen.strokeStyle = style.getPropertyValue("--raised");
    pen.fillStyle = style.getPropertyValue("--ink");
    const written = [];
    for (const i of largestFirst) {
      const [x, y] = toScreen(places[i][0], places[i][1]);
      if (y < 12 || y > height - 6 || x < 0 || x > width) continue;
      const half = (widths[i] ??= pen.measureText(names[i]).width / 2 + 4);
      const clash = written.some(([a, b, h]) => Math.abs(a - x) < h + half && Math.abs(b - y) < 16);
      if (clash || x < half || x > width - half) continue;
      written.push([x, y, half]);
      pen.strokeText(names[i], x, y);
      pen.fillText(names[i], x, y);
    }
  }

  function mark(pen) {
    const style = getComputedStyle(box);
    if (state.hover >= 0) {
      pen.lineWidth = 2;
      pen.strokeStyle = style.getPropertyValue("--ink");
      pen.beginPath();
      pen.arc(...toScreen(points.x[state.hover], points.y[state.hover]), 7, 0, 7);
      pen.stroke();
    }
    if (state.lasso) {
      pen.lineWidth = 1.5;
      pen.setLineDash([5, 4]);
      pen.strokeStyle = style.getPropertyValue("--accent");
      pen.beginPath();
      state.lasso.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
      if (!drag) pen.closePath();
      pen.stroke();
      pen.setLineDash([]);
    }
  }

  function nearest(px, py) {
    let best = -1;
    const u = unit();
    // In the map's own measure, so that the loop over all points does nothing but subtract and compare.
    const [x, y] = [(px - width / 2 - state.x) / u, (height / 2 + state.y - py) / u];
    let least = (14 / u) ** 2;
    for (let i = 0; i < points.n; i++) {
      const [dx, dy] = [points.x[i] - x, points.y[i] - y];
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
    refresh("marks");
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
      card.style.left = `${Math.max(4, Math.min(x + 12, width - card.offsetWidth - 4))}px`;
      card.style.top = `${y + 14 + card.offsetHeight > height ? Math.max(4, y - card.offsetHeight - 12) : y + 14}px`;
    }, 60);
  }

  function zoom(by, px = width / 2, py = height / 2) {
    const scale = Math.min(80, Math.max(0.5, state.scale * by));
    const real = scale / state.scale;
    const [cx, cy] = [px - width / 2, py - height / 2];
    state.x = cx - (cx - state.x) * real;
    state.y = cy - (cy - state.y) * real;
    state.scale = scale;
    moved();
  }

  // A drawn line belongs to the map: it goes along when that is moved.
  function moved() {
    if (state.line) state.lasso = outline(state.line).map(([x, y]) => toScreen((x / FULL) * 2 - 1, (y / FULL) * 2 - 1));
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
    drag = { last: at(event), moved: 0, lasso };
    if (lasso) state.lasso = [drag.last];
    box.setPointerCapture(event.pointerId);
  });
  box.addEventListener("pointermove", (event) => {
    const here = at(event);
    if (!drag) return look(nearest(...here));
    const step = Math.abs(here[0] - drag.last[0]) + Math.abs(here[1] - drag.last[1]);
    drag.moved += step;
    if (drag.lasso) {
      if (step < 3) return;
      state.lasso.push(here);
      refresh("marks");
    } else {
      state.x += here[0] - drag.last[0];
      state.y += here[1] - drag.last[1];
      moved();
    }
    drag.last = here;
  });
  box.addEventListener("pointerup", (event) => {
    const ended = drag;
    drag = null;
    if (!ended) return;
    if (ended.lasso) {
      box.dataset.mode = "";
      tools.querySelector("[data-lasso]").setAttribute("aria-pressed", "false");
      choose(state.lasso.length > 2 ? thinned(state.lasso).flatMap(toMap).join("-") : "");
      remember();
    } else if (ended.moved < 5) {
      const i = nearest(...at(event));
      if (i < 0) return;
      // Without a pointer that hovers, the first touch shows what the second opens.
      if (event.pointerType === "touch" && state.hover !== i) look(i);
      else if (event.ctrlKey || event.metaKey) open(`${box.dataset.source}/${i}`);
      else location.assign(`${box.dataset.source}/${i}`);
    }
    refresh("marks");
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
  // A line is kept as the address has it: whole numbers on the grid that the points lie on, so that the server, which
  // lists what is inside, counts what is counted here.
  function choose(line) {
    state.line = line;
    const around = outline(line);
    state.chosen = around.length > 2 ? within(around, points) : new Set();
    if (!line) state.lasso = null;
    moved();
    recolor();
    list.hidden = !line;
    if (!line) return;
    const n = state.chosen.size;
    list.replaceChildren(`${n.toLocaleString("en")} ${n === 1 ? "feature" : "features"} chosen`);
    if (n) {
      const address = `${box.dataset.source}?around=${box.dataset.drawing}-${line}#all`;
      const copy = button("copy their indices", async () => {
        await navigator.clipboard.writeText([...state.chosen].join(","));
        copy.textContent = "copied";
      });
      list.append(Object.assign(document.createElement("a"), { href: address, textContent: "list them" }), copy);
    }
    list.append(
      button("choose none", () => {
        choose("");
        remember();
      }),
    );
  }
  function button(textContent, onclick) {
    return Object.assign(document.createElement("button"), { type: "button", className: "link", textContent, onclick });
  }

  const tools = document.querySelector("[data-map-tools]");
  tools.addEventListener("click", (event) => {
    const target = event.target.closest("button, a");
    if (!target) return;
    if (target.dataset.zoom) zoom(Number(target.dataset.zoom));
    if (target.matches("[data-whole]")) {
      Object.assign(state, { scale: 1, x: 0, y: 0 });
      moved();
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
    const put = (name, value) => (value ? address.searchParams.set(name, value) : address.searchParams.delete(name));
    put("color", state.color === "cluster" ? "" : state.color);
    put("q", field.value.trim());
    put("around", state.line && `${box.dataset.drawing}-${state.line}`);
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
  new ResizeObserver(moved).observe(box);
  const schemes = () => recolor();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", schemes);
  new MutationObserver(schemes).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  if (box.dataset.around) choose(box.dataset.around);
  else recolor();
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
    place[2 * i] = x[i] = (xs[i] / FULL) * 2 - 1;
    place[2 * i + 1] = y[i] = (ys[i] / FULL) * 2 - 1;
  }
  return { n, x, y, xs, ys, place, cluster: short(2), density: new Uint8Array(buffer, 4 + 6 * n), color: new Uint8Array(4 * n), stale: true };
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

// Corners of a line as an address has it.
function outline(line) {
  const numbers = line ? line.split("-").map(Number) : [];
  return Array.from({ length: numbers.length >> 1 }, (_, i) => [numbers[2 * i], numbers[2 * i + 1]]);
}

function thinned(line) {
  const every = Math.max(1, line.length / CORNERS);
  return Array.from({ length: Math.floor(line.length / every) }, (_, i) => line[Math.floor(i * every)]);
}

// The points inside a line, by the same comparisons as app/maps.py: edge by edge, over the points at its height.
function within(line, { n, xs, ys }) {
  const odd = new Uint8Array(n);
  const byHeight = Uint32Array.from({ length: n }, (_, i) => i).sort((a, b) => ys[a] - ys[b]);
  const below = (y) => {
    let [low, high] = [0, n];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (ys[byHeight[middle]] < y) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  line.forEach(([xi, yi], i) => {
    const [xj, yj] = line.at(i - 1);
    const last = below(Math.max(yi, yj));
    for (let k = below(Math.min(yi, yj)); k < last; k++) {
      const p = byHeight[k];
      if (xs[p] < ((xj - xi) * (ys[p] - yi)) / (yj - yi) + xi) odd[p] ^= 1;
    }
  });
  const found = new Set();
  for (let i = 0; i < n; i++) if (odd[i]) found.add(i);
  return found;
}
