/* Small things that the pages need and the theme does not do; every page reads without them, too. */
"use strict";

// Search: from file:// a page may not read the others, so there the results are titles without extracts.
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS === "object") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}

// "Download this notebook" saves the file, also where a browser would rather show it.
for (const link of document.querySelectorAll("a.btn-download-source-button")) link.download = "";

// Whatever scrolls in itself can be reached with the Tab key and scrolled with the arrows, also once it is unfolded.
const mark = (box) => {
  if (box.scrollWidth > box.clientWidth + 1 && ["auto", "scroll"].includes(getComputedStyle(box).overflowX)) {
    box.tabIndex = 0;
  }
};
const sizes = new ResizeObserver((changes) => changes.forEach((change) => mark(change.target)));
const boxes = ".bd-article :is(.wide-figure, pre, table, div.math, .pst-scrollable-table-container, .output)";
for (const box of document.querySelectorAll(boxes)) sizes.observe(box);
window.MathJax?.startup?.promise?.then(() => document.querySelectorAll("mjx-container").forEach(mark));

// "Solution to Exercise 1": the space stands before the link, not underlined within it.
for (const link of document.querySelectorAll(".solution > .admonition-title > a")) {
  link.before(" ");
  link.firstChild.textContent = link.firstChild.textContent.trimStart();
}

// A comma or a full stop after a formula does not begin the next line.
for (const formula of document.querySelectorAll(".bd-article span.math")) {
  const after = formula.nextSibling;
  const marks = after?.nodeType === Node.TEXT_NODE ? after.data.match(/^[.,:;!?)\u2019\u201d]+/)?.[0] : "";
  if (!marks) continue;
  const pair = document.createElement("span");
  pair.className = "with-formula";
  formula.before(pair);
  after.data = after.data.slice(marks.length);
  pair.append(formula, marks);
}
