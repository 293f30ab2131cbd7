// Curves by plotly, loaded when a page holds one.

let loading;
function plotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL("./vendor/plotly-basic-4.1.1.min.js", import.meta.url);
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
  const Plotly = await plotly();
  const style = getComputedStyle(document.body);
  const colour = (name) => style.getPropertyValue(name).trim();
  for (const box of boxes) {
    const figure = JSON.parse(box.querySelector("script").textContent);
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
