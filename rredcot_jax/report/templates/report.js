"use strict";
// Filters and sorts the traces, unfolds their segments, moves between segments by arrow keys and between traces by
// j and k, and opens what the address names. Without it everything is there, in the order of the file.
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
  const go = (element) => {
    element.scrollIntoView({ block: "nearest" });
    element.focus({ preventScroll: true });
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select, input, textarea")) return;
    const trace = { j: 1, k: -1 }[event.key];
    if (trace) {
      const links = [...document.querySelectorAll("article:not([hidden]) .link")];
      const here = event.target.closest("article");
      const place = here ? links.indexOf(here.querySelector(".link")) + trace : trace > 0 ? 0 : -1;
      if (links[place]) go(links[place]);
      return;
    }
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const row = event.target.closest(".segments > li");
    if (!step || !row) return;
    const next = step > 0 ? row.nextElementSibling : row.previousElementSibling;
    if (next) {
      event.preventDefault();
      next.querySelector("summary").focus();
    }
  });

  // The address follows the focus, and what it names is opened.
  document.addEventListener("focusin", (event) => {
    const named = event.target.closest(".segments > li, article");
    if (named && location.hash !== `#${named.id}`) history.replaceState(null, "", `#${named.id}`);
  });
  function open() {
    const named = document.getElementById(location.hash.slice(1));
    const article = named && named.closest("article");
    if (!article) return;
    if (article.hidden) {
      controls.elements.show.value = "all";
      update();
    }
    for (let part = named; part !== article; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
    const own = named.querySelector(":scope > details");
    if (own && named !== article) own.open = true;
    named.scrollIntoView({ block: named === article ? "start" : "center" });
    (named === article ? article.querySelector(".link") : named.querySelector("summary")).focus({ preventScroll: true });
  }
  window.addEventListener("hashchange", open);
  controls.hidden = false;
  update();
  // The browser itself goes to the place first, and takes the focus away.
  window.addEventListener("load", () => requestAnimationFrame(open));
})();
