// Text whose colour is too close to what lies behind it (WCAG AA: 4.5, large 3), each pair of colours once.
() => {
  const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = paint.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3])).concat(1);
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const grounds = new Map(), seen = new Set(), found = [];
  const ground = (box) => {
    if (!box) return [255, 255, 255, 1];
    if (!grounds.has(box)) {
      const own = rgba(getComputedStyle(box).backgroundColor);
      grounds.set(box, own[3] === 1 ? own : over(own, ground(box.parentElement)));
    }
    return grounds.get(box);
  };
  const texts = document.createTreeWalker(document.querySelector("main") ?? document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const box = texts.currentNode.parentElement;
    const text = texts.currentNode.data.trim().slice(0, 40);
    if (!text || !box.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue;
    if (box.closest("mjx-assistive-mml, svg, script, style, .visually-hidden, .headerlink")) continue;
    const style = getComputedStyle(box), behind = ground(box), ink = over(rgba(style.color), behind);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const key = [ink, behind, large].join();
    if (seen.has(key)) continue;
    seen.add(key);
    const [a, b] = [light(ink), light(behind)].sort((x, y) => y - x), contrast = (a + 0.05) / (b + 0.05);
    if (contrast < (large ? 3 : 4.5)) {
      found.push(`${contrast.toFixed(2)}: ${ink} on ${behind}, "${text}" in ${box.tagName}.${box.className}`);
    }
  }
  return [seen.size, found];
}
