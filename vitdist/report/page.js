// Draws the charts of a report. Each is a specification of Vega-Lite, and its points as columns, a curve at a time.

// `ast` interprets expressions instead of compiling them: the page's policy forbids eval.
const options = { mode: "vega-lite", renderer: "svg", actions: false, ast: true, tooltip: { theme: "report" } };
for (const place of document.querySelectorAll(".chart")) {
  const { columns, specification } = JSON.parse(place.nextElementSibling.textContent);
  const points = Object.entries(columns).flatMap(([k, [steps, values]]) => steps.map((x, i) => ({ k, x, y: values[i] })));
  vegaEmbed(place, { ...specification, datasets: { points } }, options);
}
// Paper cannot be unfolded; a table of a thousand classes stays folded.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => {
  one.open ||= one.querySelectorAll("tr").length < 100;
}));
