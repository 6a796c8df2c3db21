"""pictures -> figures: the plotting that all chapters share. It knows no model."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

COLOURS = [
    "#2f6f9f",
    "#d2612f",
    "#4c9a52",
    "#8967aa",
    "#c9a227",
    "#c44e6d",
    "#4a4a4a",
    "#2aa198",
]


def use_style(picture_format: str = "png") -> None:
    """One look for every figure: white ground, sober axes, our palette.

    picture_format: "png", or "jpeg" in chapters full of pictures, which it keeps small.
    """
    with suppress(ImportError):  # in a notebook: figures as PNG at a modest size
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats(picture_format, dpi=100)
    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 3.2),
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "font.size": 10,
            "axes.prop_cycle": plt.cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "image.cmap": "viridis",
            "figure.constrained_layout.use": True,
        }
    )


def to_array(image: Image.Image | np.ndarray | Tensor) -> np.ndarray:
    """A PIL image, an array, or a tensor (3, H, W) in [-1, 1] -> (H, W, 3) uint8.

    An (H, W) map stays as it is.
    """
    if isinstance(image, Tensor):
        image = image.detach().float().cpu()
        if image.ndim == 3:
            return (
                ((image.permute(1, 2, 0) + 1) * 127.5)
                .round()
                .clamp(0, 255)
                .byte()
                .numpy()
            )
    return np.asarray(image)


def images(
    pictures: Sequence[Any] | Tensor,
    titles: Sequence[str] | None = None,
    columns: int = 8,
    size: float = 1.6,
    rows: Sequence[str] = (),
) -> Figure:
    """A grid of pictures, of `size` inches each.

    They are PIL images, uint8 arrays, or tensors (B, 3, H, W) in [-1, 1]. titles: of
    each, or of the first row alone. rows: what stands at the left of each row.
    """
    arrays = [to_array(picture) for picture in pictures]
    columns = min(columns, len(arrays))
    count = -(-len(arrays) // columns)
    heads = 0.25 * (count if len(titles or ()) > columns else bool(titles))
    figure, axes = plt.subplots(
        count, columns, figsize=(size * columns, size * count + heads), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, array) in enumerate(zip(axes.flat, arrays, strict=False)):
        axis.imshow(array)
        if titles and i < len(titles):
            axis.set_title(titles[i], fontsize=8)
    for axis, row in zip(axes[:, 0], rows, strict=False):
        axis.text(-0.08, 0.5, row, fontsize=8, ha="right", va="center",
                  transform=axis.transAxes)  # fmt: skip
    return figure


def heatmap(
    matrix: Tensor | np.ndarray,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    title: str = "",
    values: bool = False,
) -> Figure:
    """A matrix as colours, with names along its sides and, if wanted, its numbers."""
    array = np.asarray(
        matrix.detach().float().cpu() if isinstance(matrix, Tensor) else matrix
    )
    figure, axis = plt.subplots(
        figsize=(
            min(8.0, 1.5 + 0.45 * array.shape[1]),
            min(8.0, 1.0 + 0.45 * array.shape[0]),
        )
    )
    drawn = axis.imshow(array, aspect="auto")
    axis.grid(False)
    axis.set_title(title)
    if columns is not None:
        axis.set_xticks(range(array.shape[1]), columns, rotation=45, ha="right")
    if rows is not None:
        axis.set_yticks(range(array.shape[0]), rows)
    if values:
        middle = (array.max() + array.min()) / 2
        for (i, j), value in np.ndenumerate(array):
            axis.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="black" if value > middle else "white",
            )
    else:
        figure.colorbar(drawn, ax=axis)
    return figure
