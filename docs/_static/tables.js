// Makes tables sortable by a click on a head, and long ones filterable.

const FILTERED = 13;  // The number of rows from which a table can be filtered.
const WIDE = 9;  // The number of columns from which a table is set smaller.
// The numbers of characters above which the text of a cell wraps if the table is too wide.
const LONG = 18, LONG_IN_WIDE = 14, LONG_NAME = 24;

function valueOf(cell) {
  const text = cell.textContent.trim().replaceAll(",", "").replaceAll("−", "-");
  const digits = { "⁰": 0, "¹": 1, "²": 2, "³": 3, "⁴": 4, "⁵": 5, "⁶": 6, "⁷": 7, "⁸": 8, "⁹": 9 };
  const plain = text
    .replace(/ × 10/, "e")
    .replace(/[⁰¹²³⁴⁵⁶⁷⁸⁹]/g, (c) => digits[c])
    .replace("⁻", "-");
  const number = parseFloat(plain);
  if (text === "–" || text === "") return -Infinity;
  return /^-?[\d.]/.test(plain) && !Number.isNaN(number) ? number : text.toLowerCase();
}

function compare(a, b) {
  if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
  return typeof a === "number" ? -1 : 1;
}

function sort(table, head) {
  const heads = [...head.parentElement.children];
  const column = heads.indexOf(head);
  const up = head.getAttribute("aria-sort") !== "ascending";
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = table.tBodies[0];
  [...body.rows]
    .map((row) => [valueOf(row.cells[column]), row])
    .sort(([a], [b]) => (up ? compare(a, b) : compare(b, a)))
    .forEach(([, row]) => body.append(row));
}

function enhance(table) {
  for (const head of table.tHead.rows[0].cells) {
    head.classList.add("sortable");
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(table, head));
    head.addEventListener("keydown", (event) => event.key === "Enter" && sort(table, head));
  }
  const wide = table.tHead.rows[0].cells.length >= WIDE;
  table.classList.toggle("wide", wide);
  for (const cell of table.querySelectorAll("td")) {
    const most = cell.cellIndex === 0 ? LONG_NAME : wide ? LONG_IN_WIDE : LONG;
    cell.classList.toggle("long", cell.textContent.length > most);
  }
  if (table.tBodies[0].rows.length < FILTERED) return;
  const input = document.createElement("input");
  input.className = "filter";
  input.type = "search";
  input.placeholder = "Filter rows, such as int4";
  input.setAttribute("aria-label", "Filter the rows of the table");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
  (table.closest(".table-wrapper") || table).before(input);
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("table.jaxq-table").forEach(enhance);
});
