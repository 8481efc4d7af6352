"use strict";

// Turns table headings into sort buttons. Pinned rows stay first, and rows without a value last.
const collator = new Intl.Collator("en", { numeric: true });

function value(row, place) {
  const cell = row.cells[place];
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  return cell.tagName === "TH" ? (cell.querySelector(".name") ?? cell).textContent : null;
}

function compare(one, other) {
  return typeof one === "string" ? collator.compare(one, other) : one - other;
}

function sort(table, order, headings, place) {
  const heading = headings[place];
  const first = heading.dataset.first;
  const second = first === "ascending" ? "descending" : "ascending";
  const next = { none: first, [first]: second, [second]: "none" }[heading.getAttribute("aria-sort")];
  for (const each of headings) each.setAttribute("aria-sort", each === heading ? next : "none");
  const sign = next === "descending" ? -1 : 1;
  const rows = [...order];
  if (next !== "none") {
    rows.sort((a, b) => {
      if ("pinned" in a.dataset || "pinned" in b.dataset) return ("pinned" in b.dataset) - ("pinned" in a.dataset);
      const [one, other] = [value(a, place), value(b, place)];
      if (one === null || other === null) return (one === null) - (other === null);
      return sign * compare(one, other);
    });
  }
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const order = [...table.tBodies[0].rows];
  const headings = [...table.tHead.querySelectorAll("th[aria-sort]")];
  headings.forEach((heading, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sort(table, order, headings, place));
    heading.append(button);
  });
}

// Expand all details for printing, and collapse them afterward.
addEventListener("beforeprint", () => {
  for (const each of document.querySelectorAll("details:not([open])")) {
    each.open = true;
    addEventListener("afterprint", () => { each.open = false; }, { once: true });
  }
});
