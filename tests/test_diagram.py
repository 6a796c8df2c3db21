"""Diagrams: what is drawn is valid SVG, stands inside its card, and can be read."""

import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from sdlearn.book.diagram import LIT, Diagram, pale

SVG = "{http://www.w3.org/2000/svg}"


def drawn(diagram: Diagram) -> ET.Element:
    return ET.fromstring(diagram._repr_svg_())


def light(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return sum(v * w for v, w in zip(parts, (0.2126, 0.7152, 0.0722), strict=True))


def test_a_box_has_its_words_and_the_middles_of_its_sides():
    d = Diagram(200, 100, "two boxes & an arrow")
    a, b = d.box((10, 10, 60, 40), "from <x>\n(B, S, D)"), d.box((120, 10, 60, 40), dashed=True)
    d.arrow(a.right, b.left)
    svg = drawn(d)
    assert svg.find(SVG + "title").text == "two boxes & an arrow"
    assert [text.text for text in svg.iter(SVG + "text")] == ["from <x>", "(B, S, D)"]
    assert svg.findall(SVG + "path")[-1].get("d") == "M70 30L120 30"
    assert (a.top, a.bottom, b.left) == ((40, 10), (40, 50), (120, 30))
    assert sum("stroke-dasharray" in rect.attrib for rect in svg.iter(SVG + "rect")) == 1


def test_the_card_is_white_so_that_dark_pages_can_show_it():
    svg = drawn(Diagram(120, 80, "empty"))
    card = next(svg.iter(SVG + "rect"))
    assert (card.get("fill"), card.get("width"), card.get("height")) == ("#ffffff", "120", "80")


@pytest.mark.parametrize("how", [{}, {"colour": "#c9a227"}, {"colour": "#2f6f9f"}, {"lit": True}])
def test_the_words_of_a_box_stand_out_from_its_ground(how):
    d = Diagram(100, 60, "contrast")
    d.box((0, 0, 100, 60), "words", **how)
    svg = drawn(d)
    ground, ink = list(svg.iter(SVG + "rect"))[-1].get("fill"), svg.find(SVG + "text").get("fill")
    low, high = sorted((light(ground), light(ink)))
    assert (high + 0.05) / (low + 0.05) > 3.7, (ground, ink)


def test_the_larger_a_value_the_darker_its_square():
    d = Diagram(100, 100, "matrix")
    box = d.matrix(5, 6, [[0, 0.5, 1], [1, 1, 1]], side=10)
    fills = [rect.get("fill") for rect in drawn(d).iter(SVG + "rect")][1:]
    assert fills == ["#ffffff", pale(LIT, 0.5), LIT, LIT, LIT, LIT]
    assert box == (5, 6, 30, 20)


def test_a_picture_travels_inside_the_drawing():
    d = Diagram(50, 50, "picture")
    d.picture(1, 2, 40, Image.new("RGB", (4, 4), "red"))
    assert drawn(d).find(SVG + "image").get("href").startswith("data:image/png;base64,")
