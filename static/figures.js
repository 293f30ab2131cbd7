// Heat maps by plotly, loaded when a page holds one.

let loading;
function plotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL("./vendor/plotly-cartesian-4.1.1.min.js", import.meta.url);
    script.onload = () => resolve(window.Plotly ?? window.moduleName);
    script.onerror = reject;
    document.head.append(script);
  });
  return loading;
}

export async function mount() {
  const boxes = [...document.querySelectorAll("[data-figure]:not([data-drawn])")];
  if (!boxes.length) return;
  boxes.forEach((box) => (box.dataset.drawn = "yes"));
  const style = getComputedStyle(document.body);
  const colour = (name) => style.getPropertyValue(name).trim();
  for (const box of boxes) {
    const figure = JSON.parse(box.querySelector("script").textContent);
    await heatMap(await plotly(), box, figure, style, colour);
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
