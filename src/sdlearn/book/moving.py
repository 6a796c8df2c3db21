"""pictures and words -> figures that move. It knows no model.

What draws is called for every value when a program runs the notebook, and so for the
book: the figure holds all frames and a small script, data/moving.js; without scripts
they are a still picture. Where a person can move a widget it is
called again for each value that they choose.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from itertools import product
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sdlearn.book.show import to_array

LARGEST = 400_000  # bytes of a figure
SMALL = 100  # pictures less high are enlarged, so that their pixels are seen


def person_is_there() -> bool:
    """Can anyone move a widget?

    Jupyter and editors let a cell ask for input; nbconvert, nbclient and nbval do not.
    """
    try:
        import ipywidgets  # noqa: F401
        from IPython import get_ipython
    except ImportError:
        return False
    return bool(getattr(getattr(get_ipython(), "kernel", None), "_allow_stdin", False))


@dataclass(frozen=True)
class Moving:
    """A figure that moves: its title, and HTML that needs nothing else."""

    title: str
    html: str = field(repr=False)

    def _repr_html_(self) -> str:
        return self.html


def slider(
    draw: Callable[..., Any],
    axes: Mapping[str, Sequence[Any]],
    title: str,
    start: Sequence[int] | None = None,
    heads: Sequence[str] = (),
    finer: Mapping[str, Sequence[Any]] | None = None,
) -> Any:
    """A picture with one slider or two.

    It shows draw(a) or draw(a, b) for axes {name: values of a, name: values of b}; draw
    gives a picture (whatever `show.to_array` takes), a list of them side by side, or a
    pair (either, note). start: the numbers of the first values, by default the middle;
    heads: what stands above pictures side by side; finer: {name: more values}, for axes
    that a person at a widget may move in smaller steps.
    """
    names, values = list(axes), [list(one) for one in axes.values()]
    if not 1 <= len(axes) <= 2 or not all(values):
        raise ValueError(
            f"axes are {dict(axes)}; give one or two names, each with its values"
        )
    first = [len(one) // 2 for one in values] if start is None else list(start)
    if len(first) != len(values) or not all(
        0 <= i < len(one) for i, one in zip(first, values, strict=False)
    ):
        raise ValueError(
            f"start is {start}; "
            f"give the number of a value for each of {', '.join(names)}"
        )
    if person_is_there():
        fine = [
            list((finer or {}).get(name, one))
            for name, one in zip(names, values, strict=True)
        ]
        controls = [
            choice(name, fine[k], values[k][first[k]]) for k, name in enumerate(names)
        ]
        return live(controls, lambda *chosen: one_frame(title, draw(*chosen), heads))
    drawn = [with_note(draw(*chosen)) for chosen in product(*values)]
    texts = [
        [name, [spelled(value) for value in one]]
        for name, one in zip(names, values, strict=True)
    ]
    read = [f"{name} {', '.join(text)}" for name, text in texts]
    said = (
        f"From left to right, row by row: {read[0]}."
        if len(read) == 1
        else f"Down: {read[0]}. Across: {read[1]}."
    )
    frames = [frame(picture) for picture, _ in drawn]
    across = len(values[1]) if len(values) == 2 else columns(frames)
    body, sheet = view(frames, across, f"{title}. {said}", heads)
    body += "".join(
        control(name, len(one), i)
        for name, one, i in zip(names, values, first, strict=True)
    )
    body += f'<p class="moving-still">{escape(said)}</p>'
    return figure(
        title, body, axes=texts, notes=[note for _, note in drawn], sheet=sheet
    )


def words(
    picture: Any, words: Sequence[str], maps: Tensor | np.ndarray, title: str
) -> Moving:
    """A picture and its sentence: a word's map (h, w) lights up the picture."""
    if len(words) != len(maps) or not words:
        raise ValueError(
            f"{len(words)} words and {len(maps)} maps; give one map for each word"
        )
    plain = frame(picture).convert("RGB")
    frames = [plain, *(lit(plain, to_array(one)) for one in maps)]
    notes = [f"Bright: where “{word}” counts." for word in words]
    notes.insert(0, "Point to a word, tap it, or go to it with the Tab key.")
    still = f"From left to right, row by row: the picture, {', '.join(words)}."
    body, sheet = view(frames, columns(frames), f"{title}. {still}")
    pressed = '<button type="button" class="moving-word" aria-pressed="false">'
    buttons = " ".join(f"{pressed}{escape(word)}</button>" for word in words)
    body = (
        f'<div class="moving-live" hidden="hidden">{buttons}</div>{body}'
        f'<p class="moving-still">{escape(still)}</p>'
    )
    return figure(title, body, notes=notes, sheet=sheet, still="the picture")


def pieces(
    states: Sequence[Sequence[Sequence[str]]],
    notes: Sequence[str],
    title: str,
    axis: str = "step",
    start: int = 0,
) -> Moving:
    """Words that are joined step by step.

    states[step][word] is a list of pieces, notes[step] says what happened.
    """
    if len(states) != len(notes) or not states:
        raise ValueError(
            f"{len(states)} states and {len(notes)} notes; give one note for each state"
        )
    last = len(states) - 1
    shown = sorted({round(last * part / 3) for part in range(4)})
    still = "".join(
        f"<li><p>{escape(notes[i])}</p>{boxes(states[i])}</li>" for i in shown
    )
    step = '<button type="button" class="moving-step" value='
    buttons = f'{step}"-1">back</button> {step}"1">next</button>'
    body = (
        f'<ol class="moving-still">{still}</ol>'
        '<div class="moving-rows moving-live" hidden="hidden"></div>'
    )
    body += (
        control(axis, len(states), start)
        + f'<div class="moving-live" hidden="hidden">{buttons}</div>'
    )
    return figure(
        title,
        body,
        axes=[[axis, [str(i) for i in range(len(states))]]],
        notes=list(notes),
        rows=states,
    )


def ask(draw: Callable[[str], Any], text: str, name: str = "prompt") -> Any:
    """draw(text); where a person is there, with a field above it for another text."""
    if not person_is_there():
        return draw(text)
    import ipywidgets

    wide = ipywidgets.Layout(width="95%")
    return live(
        [ipywidgets.Text(text, description=name, continuous_update=False, layout=wide)],
        draw,
    )


# What these four are made of: pictures, HTML and widgets.


def frame(drawn: Any) -> Image.Image:
    """One picture, or a list of them side by side."""
    arrays = [to_array(one) for one in (drawn if isinstance(drawn, list) else [drawn])]
    return table([Image.fromarray(one).convert("RGBA") for one in arrays])


def gap(frames: Sequence[Image.Image]) -> int:
    """Transparent pixels between pictures."""
    return 6 if frames[0].height >= SMALL else 2


def table(frames: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size in rows.

    The gaps are transparent and continue the edges, or these would be blurred.
    """
    if len(sizes := {one.size for one in frames}) > 1:
        raise ValueError(
            f"the pictures have the sizes {sorted(sizes)}; give all the same"
        )
    tiles, columns, half = [], columns or len(frames), gap(frames) // 2
    for one in frames:
        pixels = np.array(one.convert("RGBA"))
        tile = np.pad(pixels, [(half, half), (half, half), (0, 0)], mode="edge")
        tile[..., 3] = np.pad(pixels[..., 3], half)
        tiles.append(tile)
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [
        np.concatenate(tiles[i : i + columns], axis=1)
        for i in range(0, len(tiles), columns)
    ]
    return Image.fromarray(np.concatenate(rows)[half:-half, half:-half])


def columns(frames: Sequence[Image.Image]) -> int:
    """How many frames fit side by side into a sheet about 1.5 times as wide as high."""
    width, height = frames[0].size
    return min(
        len(frames), max(1, round(math.sqrt(1.5 * len(frames) * height / width)))
    )


def lit(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """The picture, dark where the map is low and as it is where it is high."""
    low, high = float(heat.min()), float(heat.max())
    light = Image.fromarray(np.uint8((heat - low) / ((high - low) or 1) * 255))
    dark = Image.blend(picture, Image.new("RGB", picture.size, "#10151c"), 0.85)
    return Image.composite(
        picture, dark, light.resize(picture.size, Image.Resampling.BICUBIC)
    )


def with_note(drawn: Any) -> tuple[Any, str]:
    """What a function drew, and its note, which may be missing."""
    return drawn if isinstance(drawn, tuple) else (drawn, "")


def spelled(value: Any) -> str:
    """A value as one writes it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def view(
    frames: Sequence[Image.Image], columns: int, alt: str, heads: Sequence[str] = ()
) -> tuple[str, dict]:
    """All frames in one picture, and where in it the script finds each."""
    whole, (width, height) = table(frames, columns), frames[0].size
    times = 1 if height >= SMALL else 128 // height
    for quality in (85, 60, 35):  # noise takes many bytes; it may be coarser
        whole.save(
            file := io.BytesIO(),
            "webp",
            quality=quality,
            exact=True,
            lossless=times > 1,
        )
        if file.tell() < LARGEST // 4:
            break
    source = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    above = "".join(f"<span>{escape(head)}</span>" for head in heads)
    above = (
        above and f'<div class="moving-heads moving-live" hidden="hidden">{above}</div>'
    )
    look = f'class="dark-light{" moving-pixels" * (times > 1)}" alt="{escape(alt)}"'
    size = f'width="{times * whole.width}" height="{times * whole.height}"'
    where = {
        "full": whole.width,
        "width": width,
        "height": height,
        "gap": gap(frames),
        "columns": columns,
    }
    where["shown"] = min(640, round(2.2 * width * times))
    return (
        f'{above}<div class="moving-view"><img {look} {size} src="{source}"></div>',
        where,
    )


def control(name: str, count: int, start: int) -> str:
    """A slider over 0 to count - 1, with its name and a place for its value."""
    return (
        '<div class="moving-control moving-live" hidden="hidden"><label>'
        f'<span>{escape(name)}</span><input type="range" min="0" max="{count - 1}" '
        f'value="{start}" autocomplete="off"></label><output aria-live="off"></output>'
        "</div>"
    )


def boxes(state: Sequence[Sequence[str]]) -> str:
    """One state of `pieces`."""
    rows = (" ".join(f"<b>{escape(piece)}</b>" for piece in row) for row in state)
    return (
        '<div class="moving-rows">'
        + " ".join(f"<span>{row}</span>" for row in rows)
        + "</div>"
    )


def figure(title: str, body: str, **data: Any) -> Moving:
    """Caption, body and note, with style, script and the script's data."""
    style, script = (
        files("sdlearn").joinpath(f"data/moving.{kind}").read_text("utf-8")
        for kind in ("css", "js")
    )
    packed = escape(
        json.dumps({"title": title, **data}, ensure_ascii=False, separators=(",", ":"))
    )
    html = (
        f'<style>{style}</style><figure class="moving" role="group" '
        f'aria-label="{escape(title)}" data-moving="{packed}">'
        f"<figcaption>{escape(title)}</figcaption>{body}"
        '<p class="moving-note moving-live" aria-live="polite" hidden="hidden"></p>'
        f"</figure><script>{script}</script>"
    )
    if len(html.encode()) > LARGEST:
        raise ValueError(
            f"the figure takes {len(html.encode()):,} bytes, at most {LARGEST:,}: "
            "show fewer frames"
        )
    return Moving(title, html)


def choice(name: str, values: Sequence[Any], first: Any) -> Any:
    """A widget that chooses one of the values."""
    import ipywidgets

    options = [(spelled(value), value) for value in values]
    first = first if first in values else values[0]
    return ipywidgets.SelectionSlider(
        options=options,
        value=first,
        description=name,
        continuous_update=False,
        style={"description_width": "initial"},
        layout={"width": "28rem"},
    )


def one_frame(title: str, drawn: Any, heads: Sequence[str]) -> Moving:
    """One frame without a script."""
    picture, note = with_note(drawn)
    body, above = view([frame(picture)], 1, title)[0], " | ".join(heads)
    return Moving(title, f"<p>{escape(above)}</p>{body}<p>{escape(note)}</p>")


def live(controls: Sequence[Any], make: Callable[..., Any]) -> Any:
    """Widgets, and below them what `make` gives for their values."""
    import ipywidgets
    from IPython.display import display

    below = ipywidgets.Output()

    def redraw(_: Any = None) -> None:
        with below:
            below.clear_output(wait=True)
            display(make(*(one.value for one in controls)))

    for one in controls:
        one.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([*controls, below])
