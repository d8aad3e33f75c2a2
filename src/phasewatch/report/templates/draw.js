"use strict";
// Draws each figure of the page's own data; one that fails says so in its place and leaves the others alone.
(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const config = { displayModeBar: false, displaylogo: false, responsive: true, scrollZoom: false, doubleClick: false };
  const places = Array.from(document.querySelectorAll("[data-figure]"));
  const fail = (place) => {
    place.classList.add("failed");
    place.textContent = "This picture could not be drawn; its numbers are in the table below.";
  };
  Promise.all(places.map(async (place) => {
    const figure = figures[place.dataset.figure];
    try {
      await Plotly.newPlot(place, figure.data, figure.layout, config);
    } catch (error) {
      fail(place);
    }
  })).then(() => { document.documentElement.dataset.drawn = String(document.querySelectorAll(".figure .main-svg").length > 0); });

  // Paper is narrower than most screens and cuts what is longer than a sheet, and a drawing does not flow: it fits one while
  // it prints. A table without a picture comes out of its fold, else nothing of it would be on paper.
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
