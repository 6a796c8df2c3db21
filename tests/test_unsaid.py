"""What a sentence leaves open, and clean fills: measured on drawings whose figures are known beforehand."""

import math
import random

import numpy as np
import pytest

from sdlearn.tiny import unsaid
from sdlearn.tiny.evaluate import fresh_scenes
from sdlearn.tiny.judge import UNKNOWN, Finding
from sdlearn.tiny.scenes import BACKGROUNDS, parse
from sdlearn.tiny.unsaid import distance, entropy, fair_entropy, impurity, main_fill, openness, shades


@pytest.mark.parametrize(("sides", "throws"), [(8, 24), (4, 24), (4, 5), (2, 1)])
def test_a_fair_die_shows_less_than_all_of_its_entropy(sides, throws):
    rng = random.Random(0)
    found = [entropy(rng.randrange(sides) for _ in range(throws)) for _ in range(3000)]
    assert fair_entropy(sides, throws) == pytest.approx(np.mean(found), abs=0.02)
    assert fair_entropy(sides, throws) < math.log(sides)


def seen(things, ground):
    return Finding({name: ("own", x, y) for name, x, y in things}, ground, 0.0)


@pytest.mark.parametrize("narrow", [False, True])
def test_openness_of_a_painter_with_and_without_a_favourite(monkeypatch, narrow):
    """24 throws, of a die or of a favourite; in a third of the pictures one thing is missing, which says no side."""
    rng, asked = random.Random(1), []
    places = [((32, 64), (96, 64)), ((96, 64), (32, 64)), ((64, 32), (64, 96)), ((64, 96), (64, 32))]

    def look(judge, images):
        findings = []
        for i in range(len(images)):
            (ax, ay), (bx, by) = places[0] if narrow else rng.choice(places)
            things = [("cat", ax, ay), ("key", bx, by)][: 1 if i % 3 == 0 else 2]
            findings.append(seen(things, "pink" if narrow else rng.choice([*BACKGROUNDS])))
        return findings

    def draw(sentences):
        asked.extend(sentences)
        return [np.zeros((8, 8, 3), np.uint8)] * len(sentences)

    monkeypatch.setattr(unsaid, "look", look)
    scenes = [parse("a cat above a red key on a blue background")] * 40 + [parse("a cat on a blue background")]
    found = openness(draw, None, scenes)
    assert set(asked) == {"a cat and a red key", "a cat"} and len(asked) == 41 * 24
    assert list(found) == ["backgrounds", "sides", "backgrounds, standard error", "sides, standard error"]
    if narrow:
        assert not any(found.values())
    else:
        for name in ("backgrounds", "sides"):
            error = found[f"{name}, standard error"]
            assert 0.003 < error < 0.02 and abs(found[name] - 1) < 3 * error


def test_backgrounds_that_the_judge_does_not_know_are_no_ninth_side(monkeypatch):
    """Muddy grounds in a third of the pictures would pass for variety; in two thirds nothing can be said."""
    rng, muddy = random.Random(2), 3
    scenes = [parse("a cat on a blue background")] * 60

    def look(judge, images):
        grounds = [rng.choice([*BACKGROUNDS]) if i % 3 < muddy - 1 else UNKNOWN for i in range(len(images))]
        return [seen([("cat", 64, 64)], ground) for ground in grounds]

    monkeypatch.setattr(unsaid, "look", look)
    blank = [np.zeros((8, 8, 3), np.uint8)]
    found = openness(lambda texts: blank * len(texts), None, scenes)
    assert abs(found["backgrounds"] - 1) < 3 * found["backgrounds, standard error"] < 0.1
    muddy = 2
    assert math.isnan(openness(lambda texts: blank * len(texts), None, scenes)["backgrounds"])


def test_openness_knows_when_it_has_seen_no_sides(monkeypatch):
    monkeypatch.setattr(unsaid, "look", lambda judge, images: [seen([], "pink")] * len(images))
    blank = [np.zeros((8, 8, 3), np.uint8)]
    assert math.isnan(openness(lambda texts: blank * len(texts), None, [parse("a cat and a key")])["sides"])


def test_the_main_fill_of_true_pictures_is_a_shade_of_their_colour():
    scenes = [scene for scene in fresh_scenes(120, 0, things=1) if scene.things[0].colour]
    near = [scene for scene in scenes if distance(main_fill(scene.render()), shades(scene)) < 10]
    assert len(near) > 0.85 * len(scenes)  # but a house is mainly wall, a tulip mainly leaf
    assert impurity(scenes, [scene.render() for scene in scenes]) < 0.5


def test_a_fill_is_as_impure_as_it_is_off():
    scene = parse("a red apple on a blue background")
    picture = scene.render().astype(int)
    fill = (abs(picture - shades(scene)[0]).max(axis=2) < 3)[..., None]
    off = np.uint8(picture + fill * np.array([0, 12, -16]))
    assert impurity([scene], [off]) == pytest.approx(20, abs=0.5)
    blue = np.full((128, 128, 3), BACKGROUNDS["blue"], np.uint8)  # nothing was drawn
    assert impurity([scene], [blue]) == pytest.approx(distance(np.array(BACKGROUNDS["blue"]), shades(scene)))
    assert math.isnan(impurity([parse("a cat on a blue background")], [blue]))
