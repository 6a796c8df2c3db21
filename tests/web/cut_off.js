// What reaches over the right edge of the window although nothing around it scrolls.
() => {
  const found = [];
  for (const box of document.querySelectorAll("main *")) {
    if (box.closest("mjx-assistive-mml, svg *, .bd-sidebar-secondary, .visually-hidden")) continue;
    if (!box.checkVisibility()) continue;
    if (box.getBoundingClientRect().right <= innerWidth + 1) continue;
    let around = box;
    while (around && !["auto", "scroll"].includes(getComputedStyle(around).overflowX)) around = around.parentElement;
    if (!around || around === document.documentElement || around.matches("main, body, .bd-main, .bd-content"))
      found.push(box.outerHTML.slice(0, 120));
  }
  return found;
}
