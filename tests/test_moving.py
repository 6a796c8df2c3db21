"""Figures that move: what their HTML holds, and that they move in a browser and in Jupyter."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from queue import Empty

import numpy as np
import pytest
import torch
from PIL import Image

from sdlearn.book import moving

COLOURS = [(220, 30, 30), (30, 160, 30), (30, 30, 220), (200, 200, 40), (150, 60, 160), (20, 20, 20)]
VOID = {"img", "input"}


def plain(k: int, size: int = 128) -> np.ndarray:
    """A picture of one colour."""
    return np.full((size, size, 3), COLOURS[k], dtype=np.uint8)


class Page(HTMLParser):
    """The elements of a piece of HTML, and whether each that opens is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def all(self, tag: str, name: str = "") -> list[dict]:
        """The attributes of each element with this tag (and class)."""
        return [a for t, a in self.found if t == tag and (not name or name in (a.get("class") or "").split())]

    @property
    def data(self) -> dict:
        (one,) = self.all("figure")
        return json.loads(one["data-moving"])


def sheet_of(page: Page) -> Image.Image:
    (image,) = page.all("img")
    kind, packed = image["src"].split(",", 1)
    assert kind == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(packed)))


def one_slider() -> moving.Moving:
    return moving.slider(lambda k: (plain(k), f"note {k}"), {"step": range(6)}, "Six colours")


def two_sliders() -> moving.Moving:
    return moving.slider(lambda a, b: plain(3 * a + b), {"down": [0, 1], "across": [0, 1, 2]}, "Two", start=(1, 2))


def sentence() -> moving.Moving:
    return moving.words(plain(0), ["red", "fox"], torch.stack([torch.eye(4), torch.eye(4).flip(0)]), "Where it looks")


def merges() -> moving.Moving:
    states = [[["c", "a", "r</w>"], ["a"]], [["ca", "r</w>"], ["a"]], [["car</w>"], ["a"]]]
    return moving.pieces(states, ["letters", "c + a", "ca + r</w>"], "Merges", axis="merge")


FIGURES = [one_slider, two_sliders, sentence, merges]


@pytest.mark.parametrize("make", FIGURES)
def test_a_figure_is_whole_and_needs_nothing_else(make):
    made = make()
    page = Page(made._repr_html_())
    (figure,) = page.all("figure")
    assert figure["role"] == "group" and figure["aria-label"] == made.title and made.title in page.text
    assert repr(made) == f"Moving(title={made.title!r})"
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp|import\(|<link|<iframe", made.html)
    assert all(a.get("src", "data:").startswith("data:") for _, a in page.found)
    assert not any("id" in a for _, a in page.found)  # several on one page cannot get into each other's way
    assert not any(key.startswith("on") for _, a in page.found for key in a)
    assert len(made.html.encode()) < moving.LARGEST and make().html == made.html
    for image in page.all("img"):
        assert made.title in image["alt"] and "dark-light" in image["class"]


@pytest.mark.parametrize("make", FIGURES)
def test_without_scripts_there_is_a_still_picture_and_no_control(make):
    page = Page(make().html)
    alive = [a for tag, a in page.found if "moving-live" in (a.get("class") or "").split()]
    assert alive and all("hidden" in a for a in alive)
    stills = [a for tag, a in page.found if "moving-still" in (a.get("class") or "").split()]
    assert stills and not any("hidden" in a for a in stills)
    assert not any("hidden" in a for a in page.all("img") + page.all("div", "moving-view"))
    outside = re.sub(r'<div class="[^"]*moving-live" hidden="hidden">.*?</div>', "", make().html)
    assert "<input" not in outside and "<button" not in outside


@pytest.mark.parametrize(("make", "start", "texts"), [
    (one_slider, [3], [["step", list("012345")]]),
    (two_sliders, [1, 2], [["down", ["0", "1"]], ["across", ["0", "1", "2"]]]),
    (merges, [0], [["merge", ["0", "1", "2"]]]),
])  # fmt: skip
def test_sliders_are_native_and_named(make, start, texts):
    page = Page(make().html)
    inputs = page.all("input")
    assert [a["type"] for a in inputs] == ["range"] * len(start) and [int(a["value"]) for a in inputs] == start
    assert [int(a["max"]) for a in inputs] == [len(values) - 1 for _, values in texts]
    assert page.data["axes"] == texts and len(page.all("label")) == len(page.all("output")) == len(inputs)
    assert all(name in page.text for name, _ in texts)
    (note,) = page.all("p", "moving-note")
    assert note["aria-live"] == "polite"


def test_draw_is_called_once_for_each_value_and_every_frame_is_in_its_place():
    calls = []

    def draw(a, b):
        calls.append((a, b))
        return plain(3 * a + b), f"{a} and {b}"

    page = Page(moving.slider(draw, {"a": [0, 1], "b": [0, 1, 2]}, "t").html)
    assert calls == [(a, b) for a in (0, 1) for b in (0, 1, 2)]
    assert page.data["notes"] == [f"{a} and {b}" for a, b in calls]
    image, place = sheet_of(page), page.data["sheet"]
    assert image.width == place["full"] and place["columns"] == 3
    for k, colour in enumerate(COLOURS):
        x = k % 3 * (place["width"] + place["gap"])
        y = k // 3 * (place["height"] + place["gap"])
        middle = image.convert("RGB").crop((x, y, x + place["width"], y + place["height"]))
        assert np.abs(np.asarray(middle, int) - colour).max() < 20
    assert image.convert("RGBA").getpixel((place["width"] + 2, 5))[3] == 0  # gaps are transparent, in dark mode too


def test_small_pictures_stay_sharp_and_pictures_stand_side_by_side():
    small = torch.full((3, 6, 6), -1.0)
    small[:, :, 3:] = 1
    figure = moving.slider(lambda k: small, {"k": [1, 2]}, "t")
    (image,), place = Page(figure.html).all("img"), Page(figure.html).data["sheet"]
    assert "moving-pixels" in image["class"] and int(image["width"]) == 21 * place["full"] == 21 * 14
    exact = sheet_of(Page(figure.html)).convert("RGB").crop((8, 0, 14, 6))
    assert np.array_equal(np.asarray(exact), moving.to_array(small))  # as it is: without losses
    both = moving.frame([plain(0), plain(1)])
    assert both.size == (2 * 128 + 6, 128) and both.getpixel((130, 5))[3] == 0
    html = moving.slider(lambda k: [plain(k), plain(0)], {"k": [1, 2]}, "t", heads=["left", "right"]).html
    assert Page(html).text.count("left") == Page(html).text.count("right") == 1


def test_a_word_lights_its_place():
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0] = maps[1, 3, 3] = 0.3
    page = Page(moving.words(plain(3), ["one", "two"], maps, "t").html)
    place, image = page.data["sheet"], sheet_of(page).convert("L")
    assert [a["aria-pressed"] for a in page.all("button", "moving-word")] == ["false"] * 2
    places = [divmod(k, place["columns"]) for k in range(3)]
    pitch = place["width"] + place["gap"]
    corners = [[image.getpixel((column * pitch + x, row * pitch + x)) for x in (8, 120)] for row, column in places]
    assert (
        min(corners[0]) > 180 and corners[1][0] > 150 > 60 > corners[1][1] and corners[2][1] > 150 > 60 > corners[2][0]
    )
    flat = moving.lit(moving.frame(plain(3)).convert("RGB"), np.ones((4, 4)))  # a map without a maximum is no error
    assert flat.size == (128, 128)


def test_what_is_written_stays_text():
    nasty = "</figure><script>alert(\"x\")</script> & '<b>'"
    for made in (
        moving.slider(lambda k: (plain(0), nasty), {nasty: [nasty]}, nasty, heads=[nasty]),
        moving.words(plain(0), [nasty], torch.ones(1, 2, 2), nasty),
        moving.pieces([[[nasty]]], [nasty], nasty, axis=nasty),
    ):
        page = Page(made.html)
        assert len(page.all("script")) == len(page.all("figure")) == 1 and page.data["title"] == nasty
        assert nasty in page.data["notes"] or nasty in page.data["notes"][1] and nasty in page.text


def test_noise_is_made_smaller_and_too_much_is_refused():
    noise = np.random.default_rng(0).integers(0, 255, (20, 128, 128, 3), dtype=np.uint8)
    made = moving.slider(lambda k: noise[k], {"k": range(12)}, "noise")
    assert len(made.html) < 250_000
    with pytest.raises(ValueError, match="at most 400,000: show fewer frames"):
        moving.slider(lambda k: [noise[k], noise[k + 1], noise[k + 2]], {"k": range(18)}, "noise")


@pytest.mark.parametrize(("call", "says"), [
    (lambda: moving.slider(plain, {}, "t"), "give one or two names"),
    (lambda: moving.slider(plain, {"k": []}, "t"), "give one or two names"),
    (lambda: moving.slider(plain, {"k": [0, 1]}, "t", start=[2]), "number of a value for each of k"),
    (lambda: moving.slider(lambda k: plain(0, 128 + k), {"k": [0, 1]}, "t"), "give all the same"),
    (lambda: moving.words(plain(0), ["one"], torch.ones(2, 4, 4), "t"), "one map for each word"),
    (lambda: moving.pieces([[["a"]]], [], "t"), "one note for each state"),
])  # fmt: skip
def test_mistakes_are_told_in_a_sentence(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# In Jupyter

WIDGET, CELL = (
    "application/vnd.jupyter.widget-view+json",
    """
from sdlearn.book import moving
import numpy as np
calls = []
def draw(k):
    calls.append(k)
    return np.full((8, 8, 3), 40 * k, dtype=np.uint8), f"value {k}"
made = moving.slider(draw, {"k": [0, 1, 2]}, "title", finer={"k": range(6)})
made
""",
)
MOVE = """
slider, below = made.children
slider.value = 5
print(calls, [label for label, _ in slider.options], type(moving.ask(str.upper, "a fox")).__name__)
"""


@pytest.mark.slow
def test_a_notebook_that_a_program_runs_gets_the_static_figure():
    nbclient, v4 = pytest.importorskip("nbclient"), pytest.importorskip("nbformat").v4
    pytest.importorskip("ipywidgets")
    ran = nbclient.execute(v4.new_notebook(cells=[v4.new_code_cell(CELL), v4.new_code_cell("moving.ask(str, 'fox')")]))
    (made,), (asked,) = (cell.outputs for cell in ran.cells)
    assert "<figure" in made.data["text/html"] and WIDGET not in made.data and "widgets" not in ran.metadata
    assert made.data["text/plain"] == "Moving(title='title')" and asked.data == {"text/plain": "'fox'"}


@pytest.mark.slow
def test_a_person_gets_sliders_that_call_the_function():
    manager = pytest.importorskip("jupyter_client.manager")
    pytest.importorskip("ipywidgets")
    kernel, client = manager.start_new_kernel(kernel_name="python3")

    def run(code, person):
        sent, outputs = client.execute(code, allow_stdin=person), []
        while True:
            try:
                message = client.get_iopub_msg(timeout=60)
            except Empty:
                pytest.fail(f"the kernel does not answer: {outputs}")
            if message["parent_header"].get("msg_id") == sent:
                if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                    return outputs
                outputs.append(message["content"])

    try:
        bundles = [set(c["data"]) for c in run(CELL, False) if "execution_count" in c and "data" in c]
        assert len(bundles) == 1 and "text/html" in bundles[0] and WIDGET not in bundles[0]
        bundles = [set(c["data"]) for c in run(CELL, True) if "execution_count" in c and "data" in c]
        assert len(bundles) == 1 and WIDGET in bundles[0]
        printed = "".join(c["text"] for c in run(MOVE, True) if c.get("name") == "stdout")
        assert printed == "[1, 5] ['0', '1', '2', '3', '4', '5'] VBox\n"
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)


# In a browser


@pytest.fixture
def page(browser, tmp_path, request):
    file = tmp_path / "page.html"
    figures = "\n".join(make().html for make in FIGURES)
    file.write_text(f'<!doctype html><meta charset="utf-8"><title>t</title><body>{figures}</body>', "utf-8")
    context = browser.new_context(offline=True, viewport={"width": 390, "height": 800}, **getattr(request, "param", {}))
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or errors.append(asked.url))
    page.goto(file.as_uri())
    yield page
    assert not errors
    context.close()


def seen(figure) -> tuple[int, int, int]:
    """The colour in the middle of the picture, as it is on the screen."""
    shot = Image.open(io.BytesIO(figure.locator(".moving-view").screenshot())).convert("RGB")
    return shot.getpixel((shot.width // 2, shot.height // 2))


def near(colour, k: int) -> bool:
    return max(abs(a - b) for a, b in zip(colour, COLOURS[k], strict=True)) < 12


@pytest.mark.web
def test_sliders_change_the_picture_from_the_keyboard_and_only_their_own(page):
    first, second = (page.locator("figure.moving").nth(i) for i in range(2))
    assert near(seen(first), 3) and near(seen(second), 5) and not page.locator(".moving-still:visible").count()
    first.locator("input").focus()
    page.keyboard.press("ArrowLeft")
    assert near(seen(first), 2) and near(seen(second), 5)
    assert first.locator("output").inner_text() == "2" and first.locator(".moving-note").inner_text() == "note 2"
    assert first.locator("input").get_attribute("aria-valuetext") == "2"
    assert first.locator("img").get_attribute("alt") == "Six colours: step 2"
    second.locator("input").nth(0).focus()
    page.keyboard.press("Home")
    assert near(seen(second), 2) and first.get_attribute("data-frame") == second.get_attribute("data-frame") == "2"
    second.locator("input").nth(1).fill("1")
    assert near(seen(second), 1) and second.locator("output").all_inner_texts() == ["0", "1"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.web
def test_words_answer_pointer_keyboard_and_tap(page):
    figure = page.locator("figure.moving").nth(2)
    word = figure.get_by_role("button")
    assert word.all_inner_texts() == ["red", "fox"] and figure.get_attribute("data-frame") == "0"
    word.nth(1).hover()
    assert figure.get_attribute("data-frame") == "2"
    page.mouse.move(1, 1)
    assert figure.get_attribute("data-frame") == "0"
    word.nth(0).focus()
    assert figure.get_attribute("data-frame") == "1" and "red" in figure.locator(".moving-note").inner_text()
    word.nth(1).click()
    page.mouse.move(1, 1)
    word.nth(1).blur()
    assert figure.get_attribute("data-frame") == "2" and word.nth(1).get_attribute("aria-pressed") == "true"
    word.nth(1).click()
    page.mouse.move(1, 1)
    word.nth(1).blur()
    assert figure.get_attribute("data-frame") == "0"


@pytest.mark.web
def test_pieces_are_joined_step_by_step(page):
    figure = page.locator("figure.moving").nth(3)
    texts = lambda: figure.locator(".moving-rows:visible b").all_inner_texts()  # noqa: E731
    assert texts() == ["c", "a", "r</w>", "a"]
    figure.get_by_role("button", name="next").click()
    assert texts() == ["ca", "r</w>", "a"] and figure.locator("b.new:visible").all_inner_texts() == ["ca"]
    for _ in range(3):  # no further than the end
        figure.get_by_role("button", name="next").click()
    assert texts() == ["car</w>", "a"] and figure.locator("output").inner_text() == "2"
    figure.get_by_role("button", name="back").click()
    assert figure.locator(".moving-note").inner_text() == "c + a"


@pytest.mark.web
@pytest.mark.parametrize("page", [{"java_script_enabled": False}], indirect=True)
def test_with_scripts_off_all_frames_are_seen(page):
    assert page.locator("figure.moving").count() == 4 and page.locator("img:visible").count() == 3
    assert not page.locator("input:visible, button:visible, output:visible").count()
    assert page.locator(".moving-still:visible").count() == 4 and page.locator(".moving-rows:visible").count() == 3
