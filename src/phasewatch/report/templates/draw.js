"use strict";
// Draw each figure from the data in the page; a figure that fails shows a message and does not affect the others.
(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const config = { displayModeBar: false, displaylogo: false, responsive: true, scrollZoom: false, doubleClick: false };
  const places = Array.from(document.querySelectorAll("[data-figure]"));
  const fail = (place) => {
    place.classList.add("failed");
    place.textContent = "This figure could not be drawn. Its numbers are in the table below.";
  };
  Promise.all(places.map(async (place) => {
    const figure = figures[place.dataset.figure];
    try {
      await Plotly.newPlot(place, figure.data, figure.layout, config);
    } catch (error) {
      fail(place);
    }
  })).then(() => { document.documentElement.dataset.drawn = String(document.querySelectorAll(".figure .main-svg").length > 0); });

  // A figure does not break across pages, so it is scaled to one sheet while printing. A collapsed table without a figure
  // is expanded, because it would not be printed otherwise.
  const paper = { width: 660, height: 790, share: 0.9 };
  const folded = [...document.querySelectorAll("article:not(:has(.figure)) > details:not([open])")];
  const drawn = () => places.filter((place) => !place.classList.contains("failed"));
  const heights = new Map(places.map((p) => [p, figures[p.dataset.figure].layout.height]));
  window.addEventListener("beforeprint", () => {
    drawn().forEach((p) => Plotly.relayout(p, { width: paper.width, height: Math.min(paper.share * heights.get(p), paper.height), autosize: false }));
    folded.forEach((d) => { d.open = true; });
  });
  window.addEventListener("afterprint", () => {
    drawn().forEach((p) => Plotly.relayout(p, { width: null, height: heights.get(p), autosize: true }));
    folded.forEach((d) => { d.open = false; });
  });
})();
