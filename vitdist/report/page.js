// Draws the charts of a report, hides and shows their curves, finds and sorts classes. Each chart is a specification of
// Vega-Lite, and its points as columns, a curve at a time.

// `ast` interprets expressions instead of compiling them: the page's policy forbids eval.
// Of warnings (logLevel 2) there is one for each hidden curve: that no points have no extent.
const options = { mode: "vega-lite", renderer: "svg", actions: false, ast: true, logLevel: 1, tooltip: { theme: "report" } };
for (const place of document.querySelectorAll(".chart")) {
  const { columns, specification } = JSON.parse(place.nextElementSibling.textContent);
  const points = Object.entries(columns).flatMap(([k, [steps, values]]) => steps.map((x, i) => ({ k, x, y: values[i] })));
  const drawing = vegaEmbed(place, { ...specification, datasets: { points } }, options);
  const legend = place.parentElement.querySelector(".legend");
  legend?.addEventListener("click", async ({ target }) => {
    const button = target.closest("button"), buttons = [...legend.querySelectorAll("button")];
    if (!button) return;
    button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") === "false");
    const hidden = new Set(buttons.filter((one) => one.getAttribute("aria-pressed") === "false").map((one) => one.textContent));
    const { view } = await drawing;
    view.data("points", points.filter(({ k }) => !hidden.has(k))).runAsync();
  });
  if (legend) legend.hidden = false;
}

for (const place of document.querySelectorAll(".find")) {
  const rows = [...place.querySelectorAll("tbody tr")], bodies = [...place.querySelectorAll("tbody")];
  const search = place.querySelector(".search"), said = place.querySelector("output"), fold = place.querySelector("details");
  const sizes = bodies.map((body) => body.rows.length);

  search.hidden = fold === null;
  search.querySelector("input").addEventListener("input", ({ target }) => {
    const wanted = target.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
    const found = rows.filter((row) => !row.hidden);
    fold.open = wanted !== "" && found.some((row) => fold.contains(row));
    said.textContent = wanted && `${found.length.toLocaleString("en")} of ${said.dataset.of}`;
  });

  const number = (row, i) => (({ textContent }) => parseFloat(textContent.replaceAll(",", "")) || 0)(row.cells[i]);
  const name = (row) => row.cells[0].textContent;
  const heads = [...place.querySelectorAll("thead th")];
  for (const head of heads) {
    const button = document.createElement("button"), i = head.cellIndex;
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      rows.sort((a, b) => (i ? number(a, i) - number(b, i) : name(a).localeCompare(name(b), undefined, { numeric: true })));
      if (order === "descending") rows.reverse();
      let done = 0;
      bodies.forEach((body, n) => body.append(...rows.slice(done, (done += sizes[n]))));
      for (const other of heads) other.removeAttribute("aria-sort");
      for (const other of heads) if (other.cellIndex === i) other.setAttribute("aria-sort", order);
      for (const caption of place.querySelectorAll("caption")) caption.textContent = `By ${button.textContent}, ${order}`;
    });
  }
}

// Paper cannot be unfolded; a table of a thousand classes stays folded.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => {
  one.open ||= one.querySelectorAll("tr").length < 100 && !one.querySelector(".legend");
}));
