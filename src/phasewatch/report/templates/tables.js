"use strict";
// Sort tables by a click on a column header, and save a table as CSV. Without JavaScript the page shows everything else.
(function () {
  const number = (text) => {
    const found = text.replace(/,/g, "").replace("\u2212", "-").match(/^[+-]?\d+(\.\d+)?/);
    return found ? Number(found[0]) : null;
  };
  const compare = (a, b) => {
    const [x, y] = [number(a), number(b)];
    if (x !== null && y !== null) return x - y;
    if (x !== null || y !== null) return x !== null ? -1 : 1;  // numbers before words
    return a < b ? -1 : a > b ? 1 : 0;
  };
  const text = (cell) => cell.textContent.replace(/\u00a0/g, " ").trim();
  // A cell that begins like a formula gets an apostrophe, because spreadsheets would run it.
  const quote = (words) => `"${(/^[=@\t\r]/.test(words) || /^[+-](?!\d)/.test(words) ? "'" : "") + words.replace(/"/g, '""')}"`;

  for (const region of document.querySelectorAll(".wide")) {
    const table = region.querySelector("table");
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const isUp = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
        const rows = [...body.rows].sort((a, b) => (isUp ? 1 : -1) * compare(text(a.cells[column]), text(b.cells[column])));
        body.append(...rows);
      });
    });
    const save = document.createElement("button");
    save.type = "button";
    save.className = "csv";
    save.textContent = "Save as CSV";
    save.addEventListener("click", () => {
      const lines = [...table.rows].map((row) => [...row.cells].map((cell) => quote(text(cell))).join(","));
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([lines.join("\r\n") + "\r\n"], { type: "text/csv" }));
      link.download = `${region.dataset.name}.csv`;
      link.click();
      URL.revokeObjectURL(link.href);
    });
    region.after(save);
  }

  // A collapsed table without a figure is expanded on paper, because it would not be printed otherwise.
  const folded = [...document.querySelectorAll("article:not(:has(.figure)) > details:not([open])")];
  window.addEventListener("beforeprint", () => folded.forEach((d) => { d.open = true; }));
  window.addEventListener("afterprint", () => folded.forEach((d) => { d.open = false; }));
  document.documentElement.dataset.ready = "true";
})();
