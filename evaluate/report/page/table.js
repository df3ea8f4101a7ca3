"use strict";
// Tables that sort by a heading: a button in each, the order told by aria-sort. Rows without a value stay last.
(function () {
  const value = (row, column) => {
    const cell = row.cells[column];
    const told = cell.dataset.value;
    if (told === "") return null;
    return told === undefined ? cell.textContent.trim().toLowerCase() : Number(told);
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
      button.append(...head.childNodes);
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
})();
