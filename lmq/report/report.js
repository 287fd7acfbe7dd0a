"use strict";
// Sorts a table by the column whose heading was chosen: first by rising values, then falling.
// Cells without a value (not measured) stay last either way.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const falling = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const numeric = heading.classList.contains("n");
      const compare = (a, b) => (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [row.cells[column].dataset.v, row]);
      rows.sort(([a], [b]) => {
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        return falling ? compare(b, a) : compare(a, b);
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
// Paper cannot be unfolded: open every folded part for printing, and put it back after.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((part) => { part.open = true; });
});
addEventListener("afterprint", () => folded.forEach((part) => { part.open = false; }));
// The reader's system chooses light or dark, until the button says otherwise.
const theme = document.querySelector("button.theme");
theme.hidden = false;
theme.addEventListener("click", () => {
  const next = { system: "light", light: "dark", dark: "system" }[document.documentElement.dataset.theme ?? "system"];
  if (next === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  theme.textContent = `Theme: ${next}`;
});
// Difference of any two variants: bits per weight of every module, a row per kind, a column per layer.
const ROW = 17, COLUMN = 14, LEFT = 78, BOTTOM = 20;
const drawDifference = (part) => {
  const { kinds, names, layers, specs, edges, variants } = JSON.parse(part.querySelector("script").textContent);
  const [first, second] = [...part.querySelectorAll("select")].map((choice) => variants[choice.value]);
  const chosen = part.querySelector(".chosen");
  chosen.innerHTML = "<svg></svg>";
  const svg = chosen.firstChild;
  const put = (name, attributes, text) => {
    const made = svg.appendChild(document.createElementNS(svg.namespaceURI, name));
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const bits = (variant, kind, layer) => specs[variant.codes[kind].charCodeAt(layer) - 65];
  const count = { more: 0, fewer: 0, same: 0 };
  kinds.forEach((kind, row) => {
    put("text", { x: LEFT - 6, y: row * ROW + 12.5, "text-anchor": "end" }, names[row]);
    for (let layer = 0; layer < layers; layer++) {
      const [a, b] = [bits(first, row, layer), bits(second, row, layer)];
      if (!a || !b) continue;
      const change = a[1] - b[1];
      const step = edges.filter((edge) => Math.abs(change) > edge).length * Math.sign(change);
      count[step > 0 ? "more" : step < 0 ? "fewer" : "same"]++;
      const box = put("rect", { x: LEFT + layer * COLUMN, y: row * ROW + 1, width: COLUMN, height: ROW - 2 });
      box.style.fill = `var(--change-${edges.length + step})`;
      const signed = `${change < 0 ? "−" : "+"}${Math.abs(change).toFixed(2)}`;
      box.appendChild(document.createElementNS(svg.namespaceURI, "title")).textContent =
        `layer ${layer} ${kind}: ${a[0]} against ${b[0]}, ${signed} bits per weight`;
    }
  });
  const every = Math.ceil(layers / 8);
  for (let layer = 0; layer < layers; layer += every)
    put("text", { x: LEFT + (layer + 0.5) * COLUMN, y: kinds.length * ROW + 14, "text-anchor": "middle" }, layer);
  put("text", { x: LEFT - 6, y: kinds.length * ROW + 14, "text-anchor": "end" }, "layer");
  svg.setAttribute("viewBox", `0 0 ${LEFT + layers * COLUMN + 6} ${kinds.length * ROW + BOTTOM}`);
  svg.setAttribute("role", "img");
  const said = `${first.label} has more bits than ${second.label} in ${count.more} modules, ` +
    `fewer in ${count.fewer}, the same in ${count.same}.`;
  svg.setAttribute("aria-label", said);
  part.querySelector(".said").textContent = said;
};
for (const part of document.querySelectorAll(".chooser")) {
  part.hidden = false;
  for (const choice of part.querySelectorAll("select")) choice.addEventListener("change", () => drawDifference(part));
  drawDifference(part);
}
