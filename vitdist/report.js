// Draws the charts of a report with Vega-Lite: one figure's data in, its specification out.
// Colours are CSS variables, so that dark mode and print need no second drawing.

function ticks(values, log, stairs) {
  const levels = [...new Set(values)].sort((a, b) => a - b);
  if (!log || !levels.length) return undefined;
  if (stairs) return levels.length <= 8 ? levels : undefined;
  const [low, high] = [levels[0], levels.at(-1)];
  const digits = high / low < 100 ? [1, 2, 5] : [1];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    found.push(...digits.map((d) => d * 10 ** power).filter((v) => v >= low && v <= high));
  }
  return found.length > 1 ? found : undefined;
}

function specification({ about, curves, restarts, format, log, zero, stairs, fan }) {
  const names = Object.keys(curves);
  const points = names.flatMap((k) => curves[k][0].map((x, i) => ({ k, x, y: curves[k][1][i] })));
  const sparse = points.filter(({ k }) => !fan && curves[k][0].length <= 60);
  const steps = points.map(({ x }) => x);
  const mixed = (i) => `color-mix(in oklch increasing hue, var(--c2) ${(100 * i) / Math.max(1, names.length - 1)}%, var(--c1))`;
  const range = names.map((_, i) => (fan ? mixed(i) : `var(--c${i + 1})`));
  const levels = points.map(({ y }) => y);
  const wide = { type: "log", nice: false, domain: [0.85 * Math.min(...levels), 1.15 * Math.max(...levels)] };
  const axis = { format, tickCount: 5, values: ticks(levels, log, stairs), tickMinStep: stairs ? 1 : undefined };
  const x = {
    field: "x", type: "quantitative", title: "step", axis: { format: ",d", tickCount: 5 },
    scale: { domain: [Math.min(...steps), Math.max(...steps)], nice: false },
  };
  const y = { field: "y", type: "quantitative", title: null, axis, scale: log ? wide : { zero } };
  const color = {
    field: "k", type: "nominal", scale: { domain: names, range },
    legend: names.length > 1 && !fan ? { title: null, orient: "top", symbolType: "stroke" } : null,
  };
  const encoding = { x, y, color };
  const zoom = { name: "zoom", select: { type: "interval", encodings: ["x"], zoom: "wheel![event.ctrlKey]", translate: false }, bind: "scales" };
  const near = { name: "near", select: { type: "point", fields: ["x", "k"], nearest: true, on: "pointermove", clear: "pointerout" } };
  const step = { field: "x", type: "quantitative", title: "step", format: ",d" };
  // A list of fields shows names as "undefined" under `nearest` up to Vega-Lite 6.4 (vega/vega-lite#9707).
  const at = "(datum.datum || datum)";
  const tooltip = { value: { expr: `{curve: ${at}.k, step: format(${at}.x, ",d"), value: format(${at}.y, "${format}")}` } };
  const layer = [
    { params: [zoom], mark: { type: "line", strokeWidth: 1.6, clip: true, interpolate: stairs ? "step-after" : "linear" }, encoding },
    {
      params: [near], mark: { type: "point", filled: true, size: 70 },
      encoding: { ...encoding, tooltip, opacity: { condition: { param: "near", empty: false, value: 1 }, value: 0 } },
    },
  ];
  if (sparse.length) layer.splice(1, 0, { data: { values: sparse }, mark: { type: "point", filled: true, size: 22, opacity: 1, clip: true }, encoding });
  if (restarts.length) {
    const rule = { type: "rule", strokeDash: [3, 4], color: "var(--muted)", clip: true };
    const hint = [{ field: "t", type: "nominal", title: "start" }, step];
    layer.unshift({ data: { values: restarts.map(([x, t]) => ({ x, t })) }, mark: rule, encoding: { x, tooltip: hint } });
  }
  return { width: "container", height: 220, description: about, data: { values: points }, layer };
}

const config = {
  background: "transparent", padding: { left: 0, right: 6, top: 4, bottom: 4 }, view: { stroke: null },
  font: "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif",
  axis: {
    labelColor: "var(--muted)", titleColor: "var(--muted)", gridColor: "var(--line)", domainColor: "var(--line)",
    labelFontSize: 11, titleFontSize: 11, titleFontWeight: "normal", titlePadding: 6, labelPadding: 5, ticks: false,
  },
  axisX: { grid: false },
  legend: { labelColor: "var(--ink)", labelFontSize: 12, symbolStrokeWidth: 2.5, symbolSize: 160, offset: 4, padding: 0 },
};
// `ast` interprets expressions instead of compiling them: the page's policy forbids eval.
const options = { mode: "vega-lite", renderer: "svg", actions: false, ast: true, config, tooltip: { theme: "report" } };
for (const place of document.querySelectorAll(".chart")) {
  vegaEmbed(place, specification(JSON.parse(place.nextElementSibling.textContent)), options);
}
// Paper cannot be unfolded; a table of a thousand classes stays folded.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => {
  one.open ||= one.querySelectorAll("tr").length < 100;
}));
