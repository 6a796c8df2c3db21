"""Every page of the built book, opened from its folder with the network cut off, as a reader on a train sees it."""

import re
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urldefrag, urlsplit

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
SOURCES = [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]
CHAPTERS = [source for source in SOURCES if re.search(r"/\d\d_", source)]
PAGES = [f"{source}.html" for source in SOURCES] + ["search.html", "genindex.html"]
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
MOVING = {  # what moves under the reader's finger: a chapter, and the names of its figures' sliders, or "words"
    "01_tokenizer": ["merges"],
    "05_vae": ["share of the second"],
    "07_unet": ["words"],
    "08_ddpm": ["time t"],
    "10_guidance": ["guidance scale, seed"],
    "12_pipeline": ["strength", "steps"],
    "13_samplers": ["looks"],
    "14_inpainting": ["step"],
    "16_controlnet": ["scale"],
    "17_sdxl": ["columns cut off"],
    "18_lcm": ["t"],
}
FIGURES = "figure:has(input[type=range]), figure:has(.moving-word)"
FOLDS = ".bd-article .admonition.toggle, .bd-article .admonition.dropdown"
FAINT, CUT_OFF = (Path(__file__).with_name(name).read_text("utf-8") for name in ("faint.js", "cut_off.js"))
pytestmark = pytest.mark.web


class Visit:
    """A page that is open, and what the browser said while it loaded."""

    def __init__(self, browser, book: Path, name: str, **options):
        self.book, self.name = book, name
        self.context = browser.new_context(viewport=DESKTOP, color_scheme="light", **options)
        self.context.set_offline(True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)  # a machine may be busy
        self.said, self.asked = [], []
        self.page.on("console", lambda m: self.said.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("requestfailed", lambda request: self.said.append(f"failed: {request.url[:200]}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.open(name)

    def open(self, name: str) -> None:
        self.page.goto((self.book / urlsplit(name).path).as_uri() + name[len(urlsplit(name).path) :])
        self.page.wait_for_function("!window.MathJax?.startup?.promise || MathJax.startup.promise.then(() => true)")
        self.page.wait_for_timeout(50)

    def size(self, viewport: dict) -> None:
        self.page.set_viewport_size(viewport)
        self.page.wait_for_timeout(100)

    def theme(self, name: str) -> None:
        self.page.evaluate("name => { document.documentElement.dataset.theme = name }", name)
        self.page.wait_for_timeout(250)  # the theme fades from one colour to the other

    def unfold(self) -> None:
        self.page.evaluate(
            """folds => {
              for (const box of document.querySelectorAll(folds))
                if (box.classList.contains("toggle-hidden")) box.querySelector("button.toggle-button").click();
              for (const box of document.querySelectorAll("details")) box.open = true;
            }""",
            FOLDS,
        )
        self.page.wait_for_timeout(150)


@pytest.fixture(scope="module", params=PAGES)
def visit(request, browser, book):
    """The page on a desktop. Each test leaves it at that width, light; what is unfolded may stay so."""
    visit = Visit(browser, book, request.param)
    yield visit
    visit.context.close()


@cache
def anchors(path: Path) -> set[str]:
    return set(re.findall(r'\s(?:id|name)="([^"]+)"', path.read_text("utf-8")))


def test_loads_without_a_network_and_without_errors(visit):
    assert visit.said == []
    assert [url for url in visit.asked if urlsplit(url).scheme not in ("file", "data", "blob")] == []
    assert visit.page.title() and visit.page.locator("h1").count() >= 1


def test_formulas_are_rendered(visit):
    counts = visit.page.evaluate("""() => [
      document.querySelectorAll(".math").length,
      [...document.querySelectorAll(".math")].filter((box) => !box.querySelector("mjx-container svg")).length,
      document.querySelectorAll("mjx-merror, [data-mjx-error]").length]""")
    source = ROOT / visit.name.replace(".html", ".ipynb")
    if source.exists() and any("$" in c.source for c in nbformat.read(source, 4).cells if c.cell_type == "markdown"):
        assert counts[0] > 0
    assert counts[1:] == [0, 0], f"of {counts[0]} formulas {counts[1]} are not rendered, {counts[2]} have errors"
    text = visit.page.evaluate("""() => {
      const copy = (document.querySelector("article") ?? document.body).cloneNode(true);
      copy.querySelectorAll("pre, code, mjx-container, script, style, svg, figure").forEach((box) => box.remove());
      return copy.textContent;
    }""")
    assert re.findall(r"\\[a-zA-Z]{2,}|\\[(\[]|\$\$?[^$\n]{1,60}\$", text) == [], "raw TeX on the page"


def test_no_link_is_broken(visit):
    here = visit.book / visit.name
    links = visit.page.eval_on_selector_all("a[href]", "links => links.map(link => link.getAttribute('href'))")
    assert len(links) > 10
    broken = []
    for link in set(links):
        if urlsplit(link).scheme in ("http", "https", "mailto"):
            continue
        address, anchor = urldefrag(link)
        path = (here.parent / unquote(urlsplit(address).path)).resolve() if address else here
        if not path.is_file() or (anchor and path.suffix == ".html" and unquote(anchor) not in anchors(path)):
            broken.append(link)
    assert broken == []


def test_no_picture_is_missing_or_without_words(visit):
    visit.page.wait_for_function("[...document.images].every(image => image.complete)")
    images = visit.page.evaluate("[...document.images].map(i => [i.src.slice(0, 200), i.naturalWidth, i.alt])")
    assert [src for src, width, _ in images if not width] == []
    assert [src for src, _, alt in images if len(alt) < 5 or re.search(r"\.(png|jpe?g|svg)\b", alt)] == []
    if visit.name.removesuffix(".html") in CHAPTERS:
        assert len(images) >= 3


def test_folded_answers_open_with_the_mouse_and_the_keyboard(visit):
    """The first by hand; that all of them open, by a click of the script, which is much faster."""
    folds = visit.page.locator(FOLDS)
    if visit.name.removesuffix(".html") in CHAPTERS:
        assert folds.count() >= 3, "solutions and quiz answers"
    for fold in folds.all()[:1]:
        button, inside = fold.locator("button.toggle-button").first, fold.locator("> :not(.admonition-title)").last
        assert not inside.is_visible(), "folded at first"
        button.press("Enter")
        inside.wait_for(state="visible")
        button.click()
        inside.wait_for(state="hidden")
    states = """([folds, open]) => {
      const how = {visibilityProperty: true, opacityProperty: true};
      const boxes = [...document.querySelectorAll(folds)];
      return boxes.every((box) => box.lastElementChild.checkVisibility(how) === open);
    }"""
    visit.page.wait_for_function(states, arg=[FOLDS, False])
    clicks = "folds => document.querySelectorAll(folds).forEach(x => x.querySelector('button.toggle-button').click())"
    visit.page.evaluate(clicks, FOLDS)
    visit.page.wait_for_function(states, arg=[FOLDS, True])
    for fold in visit.page.locator(".bd-article details").all()[:1]:
        fold.locator("summary").first.press("Enter")
        assert fold.evaluate("box => box.open")
        fold.locator("summary").first.click()
        assert not fold.evaluate("box => box.open")


def picture_of(figure) -> bytes:
    """How a figure's frame looks. Not its image: that is the sheet of all frames, cut off, with the slider over it."""
    figure.page.wait_for_timeout(100)
    (shown,) = [part for part in figure.locator(".moving-view, .moving-rows.moving-live").all() if part.is_visible()]
    return shown.screenshot()


def test_sliders_change_the_picture(visit):
    figures, names = visit.page.locator(FIGURES), []
    for figure in figures.all():
        names.append(", ".join(figure.locator("label span").all_inner_texts()) or "words")
        assert figure.evaluate("box => box.outerHTML.length") < 400_000
        figure.scroll_into_view_if_needed()
        for slider in figure.locator("input[type=range]").all():
            assert slider.is_visible() and slider.evaluate("box => box.labels.length || box.ariaLabel")
            slider.press("Home")
            first, value = picture_of(figure), slider.input_value()
            slider.press("ArrowRight")
            assert slider.input_value() != value
            slider.press("End")
            assert picture_of(figure) != first, "the slider moves and the picture does not"
        for word in figure.locator("button.moving-word").all()[:2]:
            word.blur()
            first = picture_of(figure)
            word.focus()
            assert picture_of(figure) != first, "a word is chosen and the picture does not change"
            word.blur()
    assert names == MOVING.get(Path(visit.name).stem, [])


def test_the_tab_key_goes_through_a_figure_and_is_seen(visit):
    for figure in visit.page.locator(FIGURES).all():
        controls = [c for c in figure.locator("input, button").all() if c.is_visible()]
        assert all(control.evaluate("box => box.tabIndex >= 0") for control in controls)
        controls[0].focus()
        for control in controls:
            assert control.evaluate("box => box === document.activeElement"), "the Tab key goes elsewhere"
            visit.page.keyboard.press("Shift")  # the last thing used is the keyboard: the focus is drawn
            look = "box => [getComputedStyle(box).outlineStyle, parseFloat(getComputedStyle(box).outlineWidth)]"
            style, width = control.evaluate(look)
            assert style != "none" and width >= 2, "the focus cannot be seen"
            visit.page.keyboard.press("Tab")
        assert not figure.evaluate("box => box.contains(document.activeElement)"), "the Tab key does not get out"


def test_no_code_scrolls_sideways_on_a_desktop(visit):
    visit.unfold()
    blocks, wide = visit.page.evaluate("""() => {
      const blocks = [...document.querySelectorAll(".cell_input pre, .bd-article .highlight-python pre")];
      const wide = blocks.filter((box) => box.checkVisibility() && box.scrollWidth > box.clientWidth + 1);
      return [blocks.length, wide.map((box) => box.textContent.split("\\n").sort((a, b) => b.length - a.length)[0])];
    }""")
    assert wide == []
    if re.search(r"/\d\d_", visit.name):
        assert blocks > 10


def test_a_phone_scrolls_no_page_sideways(visit):
    visit.size(PHONE)
    try:
        for unfolded in (False, True):
            if unfolded:
                visit.unfold()
            width = visit.page.evaluate("scrollTo(500, 0), [document.documentElement.scrollWidth, scrollX]")
            assert width == [PHONE["width"], 0]
            assert visit.page.evaluate(CUT_OFF) == []
        small = "[...document.querySelectorAll('main p')].filter(p => parseFloat(getComputedStyle(p).fontSize) < 12)"
        assert visit.page.evaluate(f"{small}.map(p => p.outerHTML.slice(0, 90))") == []
    finally:
        visit.size(DESKTOP)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_writing_stands_out_from_its_ground(visit, theme):
    visit.theme(theme)
    try:
        visit.unfold()
        pairs, faint = visit.page.evaluate(FAINT)
        assert pairs >= 3 and faint == []
        ground = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", ground)[:3])) < 64) == (theme == "dark")
        if theme == "dark":
            images = visit.page.evaluate(
                """[...document.querySelectorAll(".bd-article img:not(.only-dark, .dark-light)")]
                .filter(image => image.checkVisibility() && !image.closest("a.btn"))
                .map(image => [image.src.slice(0, 120), getComputedStyle(image).backgroundColor])"""
            )
            assert [src for src, colour in images if colour != "rgb(255, 255, 255)"] == [], "black on black"
    finally:
        visit.theme("light")


def test_axe_finds_nothing_serious(visit):
    """axe-core, all its rules. Of code and formulas it gets the text alone, since it needs a second per thousand nodes;
    for that reason it measures the contrast of two pages, and the test above that of all. The last test of a page,
    since it changes it."""
    import axe_playwright_python

    visit.unfold()
    visit.page.evaluate("""() => {
      for (const code of document.querySelectorAll(".highlight pre")) code.textContent = code.textContent;
      for (const formula of document.querySelectorAll("mjx-container")) formula.replaceChildren();
    }""")
    visit.page.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text("utf-8"))
    rules = {} if visit.name in PAGES[:2] else {"color-contrast": {"enabled": False}}
    result = visit.page.evaluate("rules => axe.run(document, {resultTypes: ['violations'], rules})", rules)
    assert result["testEngine"]["name"] == "axe-core"
    found = [finding for finding in result["violations"] if finding["impact"] in ("serious", "critical")]
    assert [f"{finding['id']}: {node['html'][:150]}" for finding in found for node in finding["nodes"]] == []


# Once for the whole book.


def test_what_measures_a_page_finds_faults(browser, book):
    visit = Visit(browser, book, PAGES[-1])
    assert visit.page.evaluate(FAINT)[1] == visit.page.evaluate(CUT_OFF) == visit.said == []
    visit.page.evaluate("""document.querySelector("article").insertAdjacentHTML("beforeend",
      '<p style="color: #999">pale</p><div style="width: 3000px">wide</div><img src="http://example.org/none.png">')""")
    visit.page.wait_for_timeout(200)
    assert ["pale" in line for line in visit.page.evaluate(FAINT)[1]] == [True]
    assert any("wide" in line for line in visit.page.evaluate(CUT_OFF))
    assert any("example.org" in url for url in visit.asked) and visit.said
    visit.context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("chapter", MOVING)
def test_figures_move_under_a_finger(browser, book, chapter, theme):
    """On a phone each control is on the screen, large enough for a finger (WCAG 2.5.8: 24 px), and answers a tap."""
    visit = Visit(browser, book, f"book/{chapter}.html", has_touch=True)
    visit.size(PHONE)
    visit.theme(theme)
    for figure in visit.page.locator(FIGURES).all():
        figure.scroll_into_view_if_needed()
        for control in figure.locator("input, button").all():
            box = control.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
            assert min(box["width"], box["height"]) >= 24
        control, looks = figure.locator("input[type=range], .moving-word").last, {picture_of(figure)}
        for part in (0.03, 0.97):  # a slider may stand at one end already
            box = control.bounding_box()
            control.tap(position={"x": part * box["width"], "y": box["height"] / 2})
            looks.add(picture_of(figure))
        assert len(looks) > 1, "a finger changes nothing"
    visit.context.close()


def test_search_works_from_a_folder(browser, book):
    visit = Visit(browser, book, "search.html?q=cross-attention")
    results = visit.page.locator("#search-results ul.search li a")
    results.first.wait_for()
    visit.page.wait_for_function("/found|finished/.test(document.querySelector('.search-summary')?.innerText)")
    assert any("02_attention.html" in link.get_attribute("href") for link in results.all())
    results.first.click()
    visit.page.wait_for_load_state()
    assert visit.page.locator("h1").count() >= 1 and visit.said == []
    visit.context.close()


def test_search_opens_with_a_key_and_finds_nothing_for_nonsense(browser, book):
    visit = Visit(browser, book, "book/08_ddpm.html")
    visit.page.keyboard.press("Control+k")
    field = visit.page.locator(".search-button__search-container input")
    field.wait_for(state="visible")
    field.fill("xyzzyqq")
    field.press("Enter")
    visit.page.wait_for_function("/did not match/.test(document.querySelector('.search-summary')?.innerText)")
    assert visit.page.locator("#search-results ul.search li").count() == 0
    visit.context.close()


def test_the_theme_button_and_the_system_choose_the_colours(browser, book):
    visit = Visit(browser, book, PAGES[0])
    theme = "document.documentElement.dataset.theme"
    assert visit.page.evaluate(theme) == "light"
    visit.page.emulate_media(color_scheme="dark")
    visit.page.reload()
    assert visit.page.evaluate(theme) == "dark"
    seen = set()
    for _ in range(3):
        visit.page.locator(".article-header-buttons .theme-switch-button").first.click()
        seen.add(visit.page.evaluate(theme))
    assert seen == {"light", "dark"}
    visit.context.close()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_can_be_downloaded(browser, book, chapter):
    page = (book / f"{chapter}.html").read_text("utf-8")
    link = re.search(r'<a href="([^"]+)"[^>]*btn-download-source-button.*?</a>', page, re.DOTALL)
    assert link and "This notebook (.ipynb)" in link[0]
    given = (book / chapter).parent / link[1]
    assert nbformat.read(given, 4) == nbformat.read(ROOT / f"{chapter}.ipynb", 4)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def address(book):
    """The book served as on the web, for the two things that a folder cannot show."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=book)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_on_the_web_the_download_button_saves_and_results_have_extracts(browser, address):
    page = browser.new_page()
    page.goto(f"{address}/{CHAPTERS[0]}.html")
    page.locator(".dropdown-download-buttons > button").click()
    with page.expect_download() as download:
        page.locator("a.btn-download-source-button").click()
    assert download.value.suggested_filename == f"{Path(CHAPTERS[0]).name}.ipynb"
    page.goto(f"{address}/search.html?q=tokenizer")
    page.locator("#search-results li p.context").first.wait_for()
    page.close()


def test_without_scripts_everything_can_be_read(browser, book):
    """Solutions stand open (in one chapter, since all fold alike), and a figure that moves is a still picture."""
    moving = [f"book/{chapter}.html" for chapter in MOVING]
    page = browser.new_page(java_script_enabled=False)
    seen = "boxes => boxes.map(box => box.checkVisibility())"
    for name in {f"{CHAPTERS[0]}.html", *moving}:
        page.goto((book / name).as_uri())
        inside = page.locator(f":is({FOLDS}) > :not(.admonition-title)").evaluate_all(seen)
        assert all(inside) and (inside or name != f"{CHAPTERS[0]}.html"), name
        figures = page.locator(FIGURES).all()
        assert len(figures) == len(MOVING.get(Path(name).stem, []))
        for figure in figures:
            assert any(figure.locator("img, .moving-still").evaluate_all(seen)), name
    page.context.close()


@pytest.mark.parametrize("source", SOURCES)
def test_a_link_to_a_page_has_a_card(book, source):
    page = (book / f"{source}.html").read_text("utf-8")
    tags = dict(re.findall(r'<meta (?:property|name)="((?:og|twitter):[^"]+|description)" content="([^"]*)"', page))
    assert tags["og:title"] and tags["og:title"] in page.split("</title>")[0].split("<title>")[1]
    assert 20 <= len(tags["og:description"]) <= 210 and tags["description"] == tags["og:description"]
    picture = (book / source).parent / tags["og:image"]
    assert picture.read_bytes() == (ROOT / "book" / "_static" / "cover.png").read_bytes()
    assert tags["og:image:alt"] and tags["twitter:card"] == "summary_large_image"
