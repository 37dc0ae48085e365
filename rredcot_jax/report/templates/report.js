"use strict";
// Filters and sorts the traces, unfolds their segments, and moves between segments by arrow keys. Without it
// everything is there, in the order of the file.
(() => {
  const controls = document.querySelector(".controls");
  const lists = [...document.querySelectorAll(".traces")];
  if (!lists.length) return;

  function update() {
    const show = controls.elements.show.value;
    const sort = controls.elements.sort.value;
    const sign = sort.startsWith("-") ? -1 : 1;
    const value = (article) => sign * Number(article.dataset[sort.replace("-", "")]) || 0;
    let shown = 0;
    let all = 0;
    for (const list of lists) {
      const articles = [...list.children].sort((a, b) => value(b) - value(a) || a.dataset.place - b.dataset.place);
      for (const article of articles) {
        article.hidden = show !== "all" && article.dataset.right !== show;
        shown += !article.hidden;
        all += 1;
      }
      list.replaceChildren(...articles);
    }
    controls.querySelector("output").textContent = `${shown} of ${all} traces`;
  }

  for (const list of lists) [...list.children].forEach((article, place) => { article.dataset.place = place; });
  controls.addEventListener("change", update);
  controls.elements.unfold.addEventListener("click", (event) => {
    const open = event.target.getAttribute("aria-pressed") !== "true";
    event.target.setAttribute("aria-pressed", open);
    event.target.textContent = open ? "fold all segments" : "unfold all segments";
    for (const details of document.querySelectorAll("article details")) {
      if (open || details.parentElement.tagName === "LI") details.open = open;
    }
  });
  document.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const row = event.target.closest(".segments > li");
    if (!step || !row) return;
    const next = step > 0 ? row.nextElementSibling : row.previousElementSibling;
    if (next) {
      event.preventDefault();
      next.querySelector("summary").focus();
    }
  });
  controls.hidden = false;
  update();
})();
