"""Two predictions and a scale -> one guided prediction. Chapter 10.
Exported from book/10_guidance.ipynb by `make export`; edit it there.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["guide", "rescale", "Guided"]


def guide(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: u + s (c - u); s is 1 + w of the paper (Ho & Salimans 2022, eq. 6)."""
    return uncond + scale * (cond - uncond)


def rescale(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Gives each guided prediction its conditional one's standard deviation, mixed in by phi (Lin et al. 2023, 3.4)."""
    dims = tuple(range(1, guided.ndim))
    matched = guided * (cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return phi * matched + (1 - phi) * guided


class Guided:
    """A U-Net with its prompt: (xt, t) -> eps, guided from the negative context towards the context.

    unet: any callable (latents (B,C,H,W), t (B,), context (B,S,D)) -> prediction (B,C,H,W).
    context, negative: (B,S,D); a negative of batch 1 serves the whole batch. Both halves run as one batch of 2B.
    A scale up to 1 switches guidance off: the network then runs on the conditional half only and needs no negative.
    times: guidance works at times from the first to below the second only. two_passes: one half after the other.
    """

    def __init__(
        self,
        unet: Callable,
        context: Tensor,
        negative: Tensor | None,
        scale: float = 7.5,
        rescale: float = 0.0,
        times: tuple[int, int] = (0, 1000),
        two_passes: bool = False,
    ):
        if not math.isfinite(scale) or scale < 0:
            raise ValueError(
                f"guidance scale is {scale}; give a finite number, 0 or more (up to 1 is off)"
            )
        if not 0 <= rescale <= 1:
            raise ValueError(
                f"guidance rescale is {rescale}; give a number from 0 (off) to 1 (full)"
            )
        if (
            not isinstance(times, tuple | list)
            or len(times) != 2
            or not 0 <= times[0] < times[1]
        ):
            raise ValueError(
                f"guidance times are {times}; give two, the lower first, such as (0, 1000) for all"
            )
        self.unet, self.scale, self.phi, self.batch = unet, scale, rescale, len(context)
        self.context, self.times, self.contexts = context, times, ()
        if scale > 1:
            if negative is None:
                raise ValueError(
                    f"guidance scale {scale} needs a negative context; encode the empty prompt for it"
                )
            if negative.shape[1:] != context.shape[1:] or len(negative) not in (
                1,
                len(context),
            ):
                raise ValueError(
                    f"negative context is {tuple(negative.shape)} but context is {tuple(context.shape)}; "
                    "encode both with the same text encoder, one negative in all or one for each prompt"
                )
            negative = negative.expand_as(context)
            self.contexts = (
                (negative, context) if two_passes else (torch.cat([negative, context]),)
            )

    def __call__(self, xt: Tensor, t: int | Tensor) -> Tensor:
        if len(xt) != self.batch:
            raise ValueError(
                f"{len(xt)} latents but {self.batch} contexts; give one context for each picture"
            )
        if self.scale <= 1 or not self._works_at(t):
            return self.unet(xt, self._times(t, xt), self.context)
        latents = torch.cat(
            [xt] * (2 // len(self.contexts))
        )  # both halves in one batch, or one of them at a time
        answers = [
            self.unet(latents, self._times(t, latents), context)
            for context in self.contexts
        ]
        uncond, cond = torch.cat(answers).chunk(2)
        guided = guide(uncond, cond, self.scale)
        return rescale(guided, cond, self.phi) if self.phi else guided

    def _works_at(self, t: int | Tensor) -> bool:
        """Is t among the times of guidance? Asked of a tensor only where it matters, since that makes a GPU wait."""
        return (
            self.times == (0, 1000)
            or self.times[0] <= float(torch.as_tensor(t).max()) < self.times[1]
        )

    def _times(self, t: int | Tensor, latents: Tensor) -> Tensor:
        """One time for each latent, (B,)."""
        t = torch.as_tensor(t, device=latents.device)
        return (
            t.expand(len(latents)) if t.ndim == 0 else t.repeat(len(latents) // len(t))
        )
