"""Tokens look at tokens: self-, cross- and causal attention. Chapter 02.
Exported from book/02_attention.ipynb by `make export`; edit it there.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention, or cross-attention when a context is given.

    x (B, T, D) and, for cross-attention, context (B, S, context_width) -> (B, T, D).
    With `causal` a token sees itself and the tokens before it. Vaswani et al. 2017,
    section 3.2.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context_width: int | None = None,
        bias: bool = False,
    ):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(
                f"width {width} does not split into {heads} heads: "
                "choose a number that divides it"
            )
        context_width = context_width or width
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width, width, bias=bias)
        self.to_v = nn.Linear(context_width, width, bias=bias)
        self.to_out = nn.Linear(width, width)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, N, T, K), with D = N K."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self, x: Tensor, context: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        if causal and context is not None:
            raise ValueError(
                "causal is for self-attention, whose tokens have an order: "
                "leave out context or causal"
            )
        context = x if context is None else context
        q, k, v = map(
            self.split_heads, (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B, N, T, K)
        return self.to_out(y.transpose(1, 2).flatten(2))  # (B, T, D)
