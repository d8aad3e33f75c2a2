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

  // Paper is narrower than most screens, and a drawing does not flow: give it the paper's width while it prints.
  const paper = 660;
  const drawn = () => places.filter((place) => !place.classList.contains("failed"));
  window.addEventListener("beforeprint", () => drawn().forEach((p) => Plotly.relayout(p, { width: paper, autosize: false })));
  window.addEventListener("afterprint", () => drawn().forEach((p) => Plotly.relayout(p, { width: null, autosize: true })));
})();
