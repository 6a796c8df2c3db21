"""Two predictions and a scale -> one guided prediction. Chapter 10.
Exported from book/10_guidance.ipynb by `make export`; edit it there.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Conditioning = dict[str, Tensor]  # a network's keyword arguments, such as context=


def guide(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, u + s (c - u); s is 1 + w of Ho & Salimans 2022."""
    return uncond + scale * (cond - uncond)


def rescale(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Gives each guided prediction the standard deviation of its conditional one, mixed
    in by phi (Lin et al. 2024, section 3.4)."""
    dims = tuple(range(1, guided.ndim))
    matched = guided * (cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return phi * matched + (1 - phi) * guided


def check_settings(scale: float, phi: float, times: tuple[float, float]) -> None:
    """Can they be meant?"""
    if not math.isfinite(scale) or scale < 0:
        raise ValueError(
            f"guidance scale is {scale}; "
            "give a finite number, 0 or more (up to 1 is off)"
        )
    if not 0 <= phi <= 1:
        raise ValueError(
            f"guidance rescale is {phi}; give a number from 0 (off) to 1 (full)"
        )
    if len(times) != 2 or not 0 <= times[0] < times[1]:
        raise ValueError(
            f"guidance times are {times}; "
            "give two, the lower first, such as (0, 1000) for all"
        )


def check_negative(cond: Conditioning, uncond: Conditioning | None) -> None:
    """Do both name the same arguments, in shapes that fit?"""
    if uncond is None:
        raise ValueError(
            "guidance needs a negative side too: encode the empty prompt for it"
        )
    if one_sided := sorted(cond.keys() ^ uncond.keys()):
        raise ValueError(
            f"{one_sided[0]} is on one side of guidance only: encode prompts and "
            "negative prompts alike"
        )
    for name, x in uncond.items():
        wanted = cond[name].shape
        if x.shape[1:] != wanted[1:] or len(x) not in (1, *wanted[:1]):
            raise ValueError(
                f"negative {name} is {tuple(x.shape)} but {name} is {tuple(wanted)}; "
                "encode both alike, one negative in all or one for each prompt"
            )


def spread(t: float | Tensor, xt: Tensor) -> Tensor:
    """One time for each of the latents, (B,)."""
    t = torch.as_tensor(t, device=xt.device)
    return t.expand(len(xt)) if t.ndim == 0 else t.repeat(len(xt) // len(t))


class Guided:
    """A network with its conditioning: (xt, t) -> output, guided away from `uncond`.

    network: any callable (xt (B,C,H,W), t (B,), **conditioning) -> output (B,C,H,W).
    cond, uncond: its keyword arguments, each (B,...); an uncond of batch 1 serves all.
    Both halves run as one batch of 2B. A scale up to 1 switches guidance off: the
    network then runs on the conditional half only and needs no uncond.
    times: guidance works at times from the first to below the second only; (0, 1000)
    is always. two_passes: one half after the other, in half the memory.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        cond: Conditioning,
        uncond: Conditioning | None = None,
        scale: float = 7.5,
        rescale: float = 0.0,
        times: tuple[float, float] = (0, 1000),
        two_passes: bool = False,
    ):
        check_settings(scale, rescale, times)
        self.network, self.cond, self.scale, self.phi = network, cond, scale, rescale
        self.batch, self.times = len(next(iter(cond.values()))), times
        self.passes: list[Conditioning] = []
        if scale > 1:
            check_negative(cond, uncond)
            assert uncond is not None  # check_negative says so
            uncond = {name: x.expand_as(cond[name]) for name, x in uncond.items()}
            both = {name: torch.cat([uncond[name], cond[name]]) for name in cond}
            self.passes = [uncond, cond] if two_passes else [both]

    def __call__(self, xt: Tensor, t: float | Tensor) -> Tensor:
        if len(xt) != self.batch:
            raise ValueError(
                f"{len(xt)} latents but conditioning for {self.batch}; "
                "encode one prompt for each picture"
            )
        if not self.passes or not self.works_at(t):
            return self.network(xt, spread(t, xt), **self.cond)
        x = torch.cat([xt] * (2 // len(self.passes)))  # both halves, or one at a time
        answers = [self.network(x, spread(t, x), **told) for told in self.passes]
        uncond, cond = torch.cat(answers).chunk(2)
        guided = guide(uncond, cond, self.scale)
        return rescale(guided, cond, self.phi) if self.phi else guided

    def works_at(self, t: float | Tensor) -> bool:
        """Is t among the times of guidance?"""
        first, end = self.times
        return self.times == (0, 1000) or bool(first <= torch.as_tensor(t).max() < end)
