// Makes the figures of sdlearn.book.moving move: no library, nothing loaded. Without it they are still pictures.
for (const figure of document.querySelectorAll("figure.moving:not([data-ready])")) {
  figure.dataset.ready = "yes";
  const data = JSON.parse(figure.dataset.moving);
  const all = (selector) => [...figure.querySelectorAll(selector)];
  const [view] = all(".moving-view"), [rows] = all(".moving-rows.moving-live"), [note] = all(".moving-note");
  const ranges = all("input[type=range]"), values = all("output"), words = all(".moving-word"), steps = all(".moving-step");

  // A frame is one piece of the sheet; positions are in per cent of the frame, so the figure may have any width.
  const picture = (frame) => {
    const image = view.querySelector("img"), { full, width, height, gap, columns } = data.sheet;
    image.style.left = `${(-100 * (frame % columns) * (width + gap)) / width}%`;
    image.style.top = `${(-100 * Math.floor(frame / columns) * (height + gap)) / height}%`;
    image.style.width = `${(100 * full) / width}%`;
  };
  const pieces = (frame) => {
    rows.replaceChildren(...data.rows[frame].map((row, i) => {
      const line = document.createElement("span");
      line.append(...row.map((text) => {
        const piece = document.createElement("b");
        piece.textContent = text;
        piece.classList.toggle("new", frame > 0 && !data.rows[frame - 1][i].includes(text));
        return piece;
      }));
      return line;
    }));
  };

  const show = (frame, text) => {
    if (view) {
      picture(frame);
      view.querySelector("img").alt = `${data.title}: ${text}`;
    } else pieces(frame);
    note.textContent = data.notes[frame];
    figure.dataset.frame = frame;
  };
  const slide = () => {
    let frame = 0;
    const texts = ranges.map((range, i) => {
      const text = data.axes[i][1][range.value];
      frame = frame * data.axes[i][1].length + Number(range.value);
      range.setAttribute("aria-valuetext", text);
      values[i].textContent = text;
      return `${data.axes[i][0]} ${text}`;
    });
    show(frame, texts.join(", "));
  };
  const look = (button) => show(words.indexOf(button) + 1, button.textContent);
  const rest = () => {
    const pressed = words.find((button) => button.getAttribute("aria-pressed") === "true");
    if (pressed) look(pressed);
    else show(0, data.still);
  };

  const start = () => {
    all(".moving-still").forEach((part) => (part.hidden = true));
    all(".moving-live").forEach((part) => (part.hidden = false));
    if (view) {
      view.classList.add("moving-on");
      view.style.aspectRatio = `${data.sheet.width} / ${data.sheet.height}`;
      view.style.maxWidth = `${data.sheet.shown}px`;
      all(".moving-heads").forEach((heads) => (heads.style.maxWidth = `${data.sheet.shown}px`));
    }
    if (words.length) rest();
    else slide();
  };
  ranges.forEach((range) => range.addEventListener("input", slide));
  steps.forEach((button) => button.addEventListener("click", () => {
    ranges[0].value = Number(ranges[0].value) + Number(button.value);
    slide();
  }));
  words.forEach((button) => {
    button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && look(button));
    button.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && rest());
    button.addEventListener("focus", () => look(button));
    button.addEventListener("blur", rest);
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") === "true";
      words.forEach((other) => other.setAttribute("aria-pressed", String(other === button && !on)));
      rest();
    });
  });
  start();
}
