"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const touched = matchMedia("(pointer: coarse)").matches;
const LOG_TICKS = [-3, -2, -1, 0, 1, 2, 3, 4, 5].flatMap((k) => [1, 2, 5].map((n) => Number(`${n}e${k}`)));
const filters = document.getElementById("filters");
const textOfRun = new Map(all("details.run").map((run) => [run.id, run.textContent.toLowerCase()]));
const figures = all("figure.plot").map((figure) => ({
  canvas: figure.querySelector(".canvas"),
  content: JSON.parse(figure.querySelector("script").textContent),
  chosen: (name) => figure.querySelector(`.${name}`),
}));

// The filters' present choice, as a test of what has an experiment, a method and perhaps a run.
function wanted() {
  const experiment = filters.elements.experiment.value;
  const methods = new Set(all(":checked", filters.elements.methods).map((box) => box.value));
  const words = filters.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
  return (item, text = "") =>
    (!experiment || !item.experiment || item.experiment === experiment) &&
    (!methods.size || !item.method || methods.has(item.method)) &&
    words.every((word) => text.includes(word) || (textOfRun.get(item.run) ?? "").includes(word));
}

function filter() {
  const isWanted = wanted();
  for (const item of all("[data-method]")) item.hidden = !isWanted(item.dataset, item.textContent.toLowerCase());
  for (const part of all("section.experiment")) part.hidden = !part.querySelector("details.run:not([hidden])");
  const runs = all("details.run");
  const shown = runs.filter((run) => !run.hidden).length;
  filters.elements.count.value = `${shown} of ${runs.length} runs`;
  for (const figure of figures) if (figure.canvas.offsetParent) draw(figure, isWanted);
}

// A curve's mean, its band and the paper's number, which one entry of the legend shows and hides. Where an axis is
// logarithmic, means up to 0 have no place, and the band ends at the lowest mean that has one.
function traces(curve, number, quantity, against, isLog, isScore) {
  const at = curve[against];
  const values = curve.measured[quantity];
  if (!at || !values) return [];
  const hasPlace = (value, isLog) => value !== null && (!isLog || value > 0);
  const kept = at.map((x, i) => i).filter((i) => hasPlace(at[i], isLog.x) && hasPlace(values.mean[i], isLog.y));
  const lowest = isLog.y ? Math.min(...kept.map((i) => values.mean[i])) : -Infinity;
  const common = { legendgroup: `curve${number}`, meta: curve.run, mode: "lines", hoverinfo: "skip", showlegend: false };
  const band = [
    ...kept.map((i) => [at[i], values.mean[i] + values.std[i]]),
    ...kept.toReversed().map((i) => [at[i], Math.max(values.mean[i] - values.std[i], lowest)]),
  ];
  const line = {
    ...common, uid: `mean${number}`, name: curve.name, showlegend: true, hoverinfo: "all",
    mode: kept.length > 1 ? "lines" : "markers", line: { color: curve.colour, dash: curve.dash, width: 2 },
    x: kept.map((i) => at[i]), y: kept.map((i) => values.mean[i]), customdata: kept.map((i) => values.std[i]),
    hovertemplate: "%{y:.5g} ± %{customdata:.2g} at %{x:.4g}<extra>%{fullData.name}</extra>",
  };
  const shade = {
    ...common, uid: `band${number}`, fill: "toself", fillcolor: curve.colour, opacity: 0.18,
    line: { width: 0 }, x: band.map((point) => point[0]), y: band.map((point) => point[1]),
  };
  const paper = {
    ...common, uid: `paper${number}`, line: { color: curve.colour, dash: "dot", width: 1 },
    x: [line.x[0], line.x.at(-1)], y: [curve.paper, curve.paper],
  };
  return isScore && curve.paper !== null ? [shade, line, paper] : [shade, line];
}

function draw({ canvas, content, chosen }, isWanted) {
  const quantity = chosen("quantity").value;
  const isScore = quantity === content.score;
  const against = chosen("against").value;
  const isLog = { x: chosen("log-x").checked, y: chosen("log-y").checked };
  const type = (axis) => (isLog[axis] ? "log" : "linear");
  const shown = content.curves.flatMap((curve, number) =>
    traces(curve, number, quantity, against, isLog, isScore).map((trace) => ({ ...trace, visible: isWanted(curve) })),
  );
  const range = isScore && content.range && !isLog.y ? { range: content.range.slice() } : {};
  const ticks = isLog.x ? { tickvals: LOG_TICKS } : {};
  const layout = {
    uirevision: [quantity, against, type("x"), type("y")].join(), // zoomed until another plot is asked for
    legend: { uirevision: "kept", font: { size: 11 }, x: 0, y: -0.2, maxheight: 0.3, yanchor: "top", orientation: "h" },
    margin: { l: 65, r: 15, t: 15, b: 50 },
    font: { family: "system-ui, sans-serif", color: "#1b1f24" },
    paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff", hovermode: "closest",
    dragmode: touched ? false : "zoom", // a finger scrolls the page
    xaxis: { title: { text: chosen("against").selectedOptions[0].text }, type: type("x"), gridcolor: "#e5e8eb", ...ticks },
    yaxis: { title: { text: content.quantities[quantity] }, type: type("y"), gridcolor: "#e5e8eb", ...range },
  };
  const buttons = [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "autoScale2d", "resetScale2d"]]; // none that sends
  Plotly.react(canvas, shown, layout, { responsive: true, displaylogo: false, modeBarButtons: buttons });
}

// A link to a run opens it.
function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target?.matches("details")) target.open = true;
  target?.scrollIntoView();
}

if (filters) {
  for (const { canvas, content, chosen } of figures) {
    chosen("quantity").addEventListener("change", (event) => {
      chosen("log-y").checked = !event.target.value.endsWith("accuracy");
    });
    canvas.parentElement.addEventListener("change", () => draw({ canvas, content, chosen }, wanted()));
  }
  filters.addEventListener("change", filter);
  filters.elements.words.addEventListener("input", filter);
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("reset", () => setTimeout(filter));
  filter();
}
window.addEventListener("hashchange", openTarget);
openTarget();
