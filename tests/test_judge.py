"""The judge: what it learns from, what it reads in a picture, and when it says that a prompt was followed."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdlearn.tiny.judge import (
    BACKGROUND_LABELS,
    CELL,
    COLOUR_LABELS,
    EMPTY,
    IGNORE,
    OBJECT_LABELS,
    UNKNOWN,
    Finding,
    Judge,
    JudgeTask,
    example,
    look,
    spoil,
    tinted,
    unlike,
    verdict,
)
from sdlearn.tiny.scenes import BACKGROUNDS, parse, random_scene, sprite

SEEDS = st.integers(0, 2**32)


class Perfect(nn.Module):
    """A judge that has been told what is there: scenes in, the logits of their cells out."""

    def __init__(self, *scenes):
        super().__init__()
        self.scenes = scenes

    def forward(self, images):
        objects = torch.zeros(len(self.scenes), len(OBJECT_LABELS), 16, 16)
        colours = torch.zeros(len(self.scenes), len(COLOUR_LABELS), 16, 16)
        grounds = torch.zeros(len(self.scenes), len(BACKGROUND_LABELS))
        for i, scene in enumerate(self.scenes):
            objects[i, OBJECT_LABELS.index(EMPTY)] = 5
            grounds[i, BACKGROUND_LABELS.index(scene.background)] = 5
            for thing in scene.things:
                left, top, right, bottom = (round(edge / CELL) for edge in thing.box)
                objects[i, OBJECT_LABELS.index(thing.name), top:bottom, left:right] = 10
                colours[i, COLOUR_LABELS.index(thing.colour or "own"), top:bottom, left:right] = 10
        return objects, colours, grounds


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(SEEDS, st.sampled_from(["train", "colour", "pair"]))
def test_a_perfect_judge_calls_every_scene_all_right(seed, split):
    rng = random.Random(seed)
    scenes = [random_scene(rng, split) for _ in range(3)]
    findings = look(Perfect(*scenes), torch.zeros(3, 3, 128, 128))
    for scene, finding in zip(scenes, findings, strict=True):
        assert all(verdict(finding, scene).values()) and finding.unknown == 0
        for thing in scene.things:
            colour, x, y = finding.things[thing.name]
            left, top, right, bottom = thing.box
            assert colour == (thing.colour or "own")
            assert abs(x - (left + right) / 2) <= CELL and abs(y - (top + bottom) / 2) <= CELL


PAIR = parse("a red apple to the left of a cat on a blue background")
FOUND = Finding({"apple": ("red", 32, 64), "cat": ("own", 96, 64)}, "blue", 0.0)


@pytest.mark.parametrize(("changes", "wrong"), [
    ({}, set()),
    ({"background": "pink"}, {"background"}),
    ({"background": UNKNOWN}, {"background"}),
    ({"unknown": 0.5}, {"objects"}),
    ({"things": {"apple": ("green", 32, 64), "cat": ("own", 96, 64)}}, {"colours"}),
    ({"things": {"apple": ("red", 32, 64), "cat": (UNKNOWN, 96, 64)}}, {"colours"}),
    ({"things": {"apple": ("red", 96, 64), "cat": ("own", 32, 64)}}, {"relation"}),
    ({"things": {"apple": ("red", 64, 32), "cat": ("own", 64, 96)}}, {"relation"}),
    ({"things": {"apple": ("red", 32, 64)}}, {"objects", "colours", "relation"}),
    ({"things": {"apple": ("red", 32, 64), "dog": ("own", 96, 64)}}, {"objects", "colours", "relation"}),
    ({"things": FOUND.things | {"sun": ("own", 64, 20)}}, {"objects"}),
    ({"things": {}}, {"objects", "colours", "relation"}),
])  # fmt: skip
def test_verdict_names_what_is_wrong(changes, wrong):
    result = verdict(replace(FOUND, **changes), PAIR)
    assert {name for name, right in result.items() if not right} == (wrong | {"all"} if wrong else set())


def test_a_single_thing_has_no_relation_to_get_wrong():
    scene = parse("a cat on a blue background")
    assert all(verdict(Finding({"cat": ("own", 3, 3)}, "blue", 0.0), scene).values())


@pytest.mark.parametrize(("sentence", "a", "b"), [
    ("a cat above a dog on a blue background", (60, 30), (68, 98)),
    ("a cat below a dog on a blue background", (60, 98), (68, 30)),
    ("a cat to the right of a dog on a blue background", (98, 60), (30, 50)),
])  # fmt: skip
def test_all_four_relations(sentence, a, b):
    scene = parse(sentence)
    right = Finding({"cat": ("own", *a), "dog": ("own", *b)}, "blue", 0.0)
    wrong = Finding({"cat": ("own", *b), "dog": ("own", *a)}, "blue", 0.0)
    assert verdict(right, scene)["relation"] and not verdict(wrong, scene)["relation"]


def test_a_speck_is_not_an_object_and_unknown_cells_are_counted():
    class Specks(nn.Module):
        def forward(self, images):
            objects = torch.zeros(1, len(OBJECT_LABELS), 16, 16)
            objects[:, OBJECT_LABELS.index(EMPTY)] = 1
            objects[0, OBJECT_LABELS.index("cat"), 0, :5] = 2  # five cells: fewer than six
            objects[0, OBJECT_LABELS.index("dog"), 4, :9] = 2
            objects[0, OBJECT_LABELS.index(UNKNOWN), 8, :14] = 2
            return objects, torch.zeros(1, len(COLOUR_LABELS), 16, 16), torch.zeros(1, len(BACKGROUND_LABELS))

    (finding,) = look(Specks(), torch.zeros(1, 3, 128, 128))
    assert set(finding.things) == {"dog"} and finding.unknown == pytest.approx(14 / 28)


def test_shapes_of_the_judge():
    objects, colours, grounds = Judge(width=32)(torch.zeros(2, 3, 128, 128))
    assert objects.shape == (2, 51, 16, 16) and colours.shape == (2, 10, 16, 16) and grounds.shape == (2, 9)


@settings(deadline=None, max_examples=60)
@given(SEEDS)
def test_a_spoiled_drawing_has_its_size_and_is_another(seed):
    rng = random.Random(seed)
    drawing, other = sprite("fox", None, rng.randint(50, 96)), sprite("castle", None, rng.randint(50, 96))
    before = drawing.copy()
    spoiled = spoil(drawing, rng, other)
    assert spoiled.shape == drawing.shape and spoiled.dtype == np.uint8
    assert not np.array_equal(spoiled, drawing) and np.array_equal(drawing, before)  # sprites are shared: never changed


def test_tinted_keeps_shape_and_outlines():
    drawing = sprite("apple", "red", 60)
    out = tinted(drawing, random.Random(0))
    dark = drawing[..., :3].max(-1) <= 60
    assert np.array_equal(out[..., 3], drawing[..., 3]) and np.array_equal(out[dark], drawing[dark])
    assert not np.array_equal(out, drawing)


def test_an_unknown_background_is_far_from_all_that_have_names():
    colour = unlike(BACKGROUNDS.values(), random.Random(3))
    assert min(sum(abs(a - b) for a, b in zip(colour, known, strict=True)) for known in BACKGROUNDS.values()) > 60


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_an_example_is_deterministic_and_its_labels_make_sense(seed):
    image, objects, colours, ground = example(random.Random(seed))
    again = example(random.Random(seed))
    assert torch.equal(image, again[0]) and torch.equal(objects, again[1])
    assert image.shape == (3, 128, 128) and objects.shape == colours.shape == (16, 16)
    assert 0 <= ground < len(BACKGROUND_LABELS)
    nothing = (objects == OBJECT_LABELS.index(EMPTY)) | (objects == OBJECT_LABELS.index(UNKNOWN))
    assert bool((colours[nothing] == IGNORE).all()) and bool((colours[~nothing] != IGNORE).all())
    assert not bool((objects == OBJECT_LABELS.index(EMPTY)).all())


def test_the_task_has_a_finite_loss_for_both_kinds_of_background():
    task = JudgeTask(Judge(width=32))
    batch = task.examples([random.Random(i) for i in range(30, 62)])
    losses = task(batch)
    losses["loss"].backward()
    assert all(loss.isfinite() for loss in losses.values()) and 0 <= losses["cells_right"] <= 1
    assert OBJECT_LABELS.index(UNKNOWN) in batch["objects"]
    assert BACKGROUND_LABELS.index(UNKNOWN) in batch["background"]


@pytest.mark.slow
def test_a_judge_can_learn(tmp_path):
    """A few steps on one batch: the loss falls."""
    torch.manual_seed(0)
    task = JudgeTask(Judge(width=32))
    batch = task.examples([random.Random(i) for i in range(4)])
    optimizer = torch.optim.Adam(task.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = task(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
