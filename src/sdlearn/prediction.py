"""What a network answers: the noise, the picture, or v. Chapter 08.
Exported from book/08_ddpm.ipynb by `make export`; edit it there.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from sdlearn.schedule import Level


class Prediction(NamedTuple):
    """How to train a network and how to read it; nothing else needs to know.

    target(x0, noise, level): what it has to answer at xt = add_noise(x0, noise, level).
    split(xt, output, level): its answer, read as the pair (x0, eps).
    """

    name: str
    target: Callable[[Tensor, Tensor, Level], Tensor]
    split: Callable[[Tensor, Tensor, Level], tuple[Tensor, Tensor]]


EPSILON = Prediction(  # the noise: Ho et al. 2020, SD 1
    "epsilon",
    target=lambda x0, noise, at: noise,
    split=lambda xt, eps, at: ((xt - at.sigma * eps) / at.alpha, eps),
)

SAMPLE = Prediction(  # the picture
    "sample",
    target=lambda x0, noise, at: x0,
    split=lambda xt, x0, at: (x0, (xt - at.alpha * x0) / at.sigma),
)

V = Prediction(  # Salimans & Ho 2022, appendix D; SD 2
    "v_prediction",
    target=lambda x0, noise, at: at.alpha * noise - at.sigma * x0,
    split=lambda xt, v, at: (
        at.alpha * xt - at.sigma * v,
        at.sigma * xt + at.alpha * v,
    ),
)

PREDICTIONS = {prediction.name: prediction for prediction in (EPSILON, SAMPLE, V)}
