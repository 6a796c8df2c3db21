"""The plotting that all chapters share: pictures of every kind become the same grid."""

import ast
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from sdlearn.book import show  # noqa: E402


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_every_kind_of_picture_becomes_the_same_array():
    tensor = torch.zeros(3, 4, 6)
    tensor[0] = 1
    tensor[1] = -1
    tensor[2] = 7  # beyond the range: cut, not wrapped
    array = show.to_array(tensor)
    assert array.shape == (4, 6, 3) and array.dtype == np.uint8 and array[0, 0].tolist() == [255, 0, 255]
    assert np.array_equal(show.to_array(Image.fromarray(array)), array) and np.array_equal(show.to_array(array), array)
    assert show.to_array(torch.zeros(4, 6)).shape == (4, 6)
    assert show.to_array(tensor.bfloat16().requires_grad_()).dtype == np.uint8


@pytest.mark.parametrize(
    ("count", "columns", "shape"), [(1, 8, (1, 1)), (8, 8, (1, 8)), (9, 8, (2, 8)), (5, 2, (3, 2))]
)
def test_the_grid_has_as_many_places_as_it_needs(count, columns, shape):
    figure = show.images(torch.zeros(count, 3, 8, 8), [f"picture {i}" for i in range(count)], columns=columns)
    axes = np.array(figure.axes).reshape(shape)
    assert [len(axis.images) for axis in axes.flat] == [1] * count + [0] * (axes.size - count)
    assert [axis.get_title() for axis in axes.flat][:count] == [f"picture {i}" for i in range(count)]
    assert not any(axis.axison for axis in axes.flat)


def test_a_heat_map_shows_names_and_numbers():
    figure = show.heatmap(torch.eye(2), ["a", "b"], ["c", "d"], "title", values=True)
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["c", "d"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axis.texts] == ["1.00", "0.00", "0.00", "1.00"]
    assert {text.get_color() for text in axis.texts} == {"black", "white"} and axis.get_title() == "title"
    assert len(show.heatmap(np.zeros((3, 3))).axes) == 2  # without numbers: a colour bar


def test_one_style_for_all():
    with plt.rc_context():
        show.use_style()
        assert plt.rcParams["figure.facecolor"] == "white"
        assert [entry["color"] for entry in plt.rcParams["axes.prop_cycle"]] == show.COLOURS


def test_plotting_imports_no_model():
    tree = ast.parse(Path(show.__file__).read_text("utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.startswith("sdlearn")]
