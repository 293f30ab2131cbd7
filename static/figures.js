// Curves by plotly, loaded when a page holds one.

// The basic bundle draws no heat maps; the larger one is loaded only by pages that hold one.
const bundles = { lines: "plotly-basic-4.1.1.min.js", heatmap: "plotly-cartesian-4.1.1.min.js" };
const loading = {};
function plotly(kind) {
  loading[kind] ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL(`./vendor/${bundles[kind]}`, import.meta.url);
    script.onload = () => resolve(window.Plotly ?? window.moduleName);
    script.onerror = reject;
    document.head.append(script);
  });
  return loading[kind];
}

export async function mount() {
  const boxes = [...document.querySelectorAll("[data-figure]:not([data-drawn])")];
  if (!boxes.length) return;
  boxes.forEach((box) => (box.dataset.drawn = "yes"));
  const style = getComputedStyle(document.body);
  const colour = (name) => style.getPropertyValue(name).trim();
  for (const box of boxes) {
    const figure = JSON.parse(box.querySelector("script").textContent);
    if (figure.kind === "heatmap") {
      await heatMap(await plotly("heatmap"), box, figure, style, colour);
      continue;
    }
    const Plotly = await plotly("lines");
    const data = figure.data.map((trace) => ({ ...trace, line: { color: `rgb(${colour("--heat")})`, width: 1.5 }, hoverlabel: { namelength: 0 } }));
    const axis = { gridcolor: colour("--rule"), zeroline: false, linecolor: colour("--rule-strong"), automargin: true };
    const layout = {
      margin: { t: 6, r: 8, b: 30, l: 44 },
      height: 190,
      font: { family: style.fontFamily, size: 11, color: colour("--muted") },
      paper_bgcolor: "transparent",
      plot_bgcolor: "transparent",
      xaxis: axis,
      yaxis: axis,
      showlegend: false,
    };
    await Plotly.newPlot(box, data, layout, { displayModeBar: false, responsive: true });
  }
}

async function heatMap(Plotly, box, figure, style, colour) {
  const axis = { gridcolor: "transparent", zeroline: false, automargin: true, fixedrange: true };
  const [low, high] = [`rgb(${colour("--heat")} / 0)`, `rgb(${colour("--heat")})`].map((c) => c.replace(/rgb\((\d+) (\d+) (\d+)(?: \/ (\S+))?\)/, (_, r, g, b, a) => `rgba(${r},${g},${b},${a ?? 1})`));
  const data = figure.data.map((trace) => ({ ...trace, xgap: 1, ygap: 1, colorscale: [[0, low], [1, high]], colorbar: { thickness: 8, outlinewidth: 0, len: 0.9 } }));
  // On a phone the names of rows would take the screen; the whole of them stand in the hovers.
  const room = box.parentElement.clientWidth - 4;
  const narrow = room < 600;
  if (narrow) data.forEach((trace) => (trace.showscale = false));
  const columns = figure.data[0].x.length;
  const layout = {
    margin: { t: 6, r: 8, b: 60, l: 60 },
    height: figure.height + 60,
    width: Math.max(room, (narrow ? 130 : 260) + columns * 14),
    font: { family: style.fontFamily, size: 11, color: colour("--ink") },
    paper_bgcolor: "transparent",
    plot_bgcolor: colour("--raised"),
    xaxis: { ...axis, ...figure.layout.xaxis },
    yaxis: { ...axis, ...figure.layout.yaxis, ...(narrow ? { ticktext: figure.brief } : {}) },
  };
  box.querySelector("script").remove();
  await Plotly.newPlot(box, data, layout, { displayModeBar: false });
}
