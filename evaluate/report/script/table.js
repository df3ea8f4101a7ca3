"use strict";
// Tables that sort: a button in each heading, the order in aria-sort. Rows without a value stay last. Tables wider than
// the page say so, and scroll by keys.
(function () {
  const value = (row, column) => {
    const cell = row.cells[column];
    const held = cell.dataset.value;
    if (held === "") return null;
    return held === undefined ? cell.textContent.trim().toLowerCase() : Number(held);
  };

  function sort(table, column, descending) {
    const body = table.tBodies[0];
    const rows = Array.from(body.rows, (row, i) => ({ row, i, key: value(row, column) }));
    rows.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.i - b.i;
      const order = a.key < b.key ? -1 : a.key > b.key ? 1 : 0;
      return (descending ? -order : order) || a.i - b.i;
    });
    body.append(...rows.map((one) => one.row));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.setAttribute("aria-label", `Sort by ${head.textContent.trim()}`);
      head.append(button);
      button.addEventListener("click", () => {
        const was = head.getAttribute("aria-sort");
        const descending = was ? was === "ascending" : head.classList.contains("n") && column > 0;
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sort(table, column, descending);
      });
    });
  }

  // Names of what scrolls: the section's heading.
  function wide() {
    for (const box of document.querySelectorAll(".wide")) {
      const scrolls = box.scrollWidth > box.clientWidth + 1;
      box.classList.toggle("scrolls", scrolls);
      if (!scrolls) { for (const name of ["tabindex", "role", "aria-label"]) box.removeAttribute(name); continue; }
      box.tabIndex = 0;
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", `${box.closest("section")?.querySelector("h2")?.textContent ?? "Table"}: scrolls sideways`);
    }
  }
  wide();
  addEventListener("resize", wide);
  tcsae.wide = wide;
  const differences = document.getElementById("differences");
  differences?.addEventListener("change", () => {
    document.body.classList.toggle("with-differences", differences.checked);
    wide();
  });
})();
