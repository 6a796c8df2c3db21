"""A trained network -> the same answers with less time or memory. Chapter 19.
Exported from book/19_speed.ipynb by `make export`; edit it there.
"""

import ctypes
import shutil
import sys
import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlearn.attention import Attention
from sdlearn.blocks import ResBlock
from sdlearn.eightbits import in_eight_bits
from sdlearn.pipeline import StableDiffusion
from sdlearn.unet import SpatialTransformer
from sdlearn.vae import VAE, DiagonalGaussian

LARGE = 2**20  # weights of one head, from which slices pay
# weights that are alive at once: 8 MB in 16 bits, what a processor's cache can hold
BLOCK = 2**22


def sliced_attention(q: Tensor, k: Tensor, v: Tensor, block: int = BLOCK) -> Tensor:
    """softmax(q k^T / sqrt K) v, at most `block` weights at a time.

    q: (B, N, T, K); k and v: (B, N, S, K).

    Each row of weights is whole, so nothing is approximated; unlike FlashAttention (Dao
    et al. 2022) no running softmax is needed, since a row of one picture's weights is
    short.
    """
    shape, (places, words) = q.shape, (q.shape[2], k.shape[2])
    q, k, v = (
        (y if y.is_contiguous() else y.contiguous()).flatten(0, 1)
        for y in (q * q.shape[-1] ** -0.5, k, v)
    )
    heads = max(1, min(len(q), max(torch.get_num_threads(), block // (places * words))))
    rows = max(1, min(places, block // (heads * words)))
    y = torch.empty_like(q)
    for head in range(0, len(q), heads):
        some = slice(head, head + heads)
        keys, values = k[some].transpose(1, 2), v[some]
        for row in range(0, places, rows):
            weights = torch.bmm(q[some, row : row + rows], keys).softmax(dim=-1)
            y[some, row : row + rows] = torch.bmm(weights, values)
    return y.view(shape)


@cache
def slices_win(dtype: torch.dtype, positions: int = 2048) -> bool:
    """Whether slices are faster here than PyTorch's kernel; measured only once."""
    q, k, v = torch.zeros(3, 1, 8, positions, 40, dtype=dtype)
    forms: list[Callable] = [sliced_attention, F.scaled_dot_product_attention]
    times: dict[Callable, list[float]] = {form: [] for form in forms}
    with torch.inference_mode():
        for form in forms * 4:  # they take turns; the best of four counts
            started = time.perf_counter()
            form(q, k, v)
            times[form].append(time.perf_counter() - started)
    ours, theirs = (min(times[form]) for form in forms)
    return ours < theirs


class FastAttention(Attention):
    """`Attention` for drawing: in slices where that is faster, and the words' keys and
    values computed only once.

    It shares the weights of the attention that it replaces. A context is recognised by
    being the same tensor, as long as the weights are the same too; the keys and values
    of the last two are kept, since guidance in two passes takes turns between two.
    """

    def __init__(self, attention: Attention, sliced: bool):
        nn.Module.__init__(self)
        self.heads, self.sliced = attention.heads, sliced
        self.known: list[tuple] = []
        for name, part in attention.named_children():
            setattr(self, name, part)

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.to_k(context), self.to_v(context)
        return self.split_heads(k), self.split_heads(v)

    def words(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Its keys and values, computed at the first time."""
        if self.to_k._forward_hooks or self.to_v._forward_hooks:  # a LoRA beside them
            return self.keys_and_values(context)
        weights = [  # those made in inference mode cannot be changed outside of it
            (p.data_ptr(), None if p.is_inference() else p._version)
            for p in self.parameters()
        ]
        for known, then, *both in self.known:
            if known is context and then == weights:
                return both[0], both[1]
        found = self.keys_and_values(context)
        self.known = [(context, weights, *found), *self.known[:1]]
        return found

    def forward(
        self, x: Tensor, context: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        if causal:
            return super().forward(x, context, causal)
        q = self.split_heads(self.to_q(x))
        k, v = self.keys_and_values(x) if context is None else self.words(context)
        large = self.sliced and q.shape[2] * k.shape[2] >= LARGE
        attend = sliced_attention if large else F.scaled_dot_product_attention
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))


def places(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that share `overlap`, the last of them ending at `length`."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def ramp(tile: int, begins: bool, ends: bool, overlap: int) -> Tensor:
    """How much each position of a tile counts.

    Less and less towards an edge behind which another tile goes on.
    """
    rise = (torch.arange(tile) + 0.5).div(overlap).clamp(max=1)
    ones = torch.ones(tile)
    return torch.minimum(ones if begins else rise, ones if ends else rise.flip(0))


def tiled(
    work: Callable[[slice, slice], Tensor],
    size: tuple[int, int],
    tile: int,
    overlap: int,
    scale: int,
) -> Tensor:
    """What `work(rows, columns)` answers for overlapping windows, blended.

    size: of the map, (h, w).

    The answer to a window is `scale` times as large as the window.
    """
    whole = scale * size[0], scale * size[1]
    y: Tensor | None = None
    total = torch.zeros(whole)
    for top in places(size[0], tile, overlap):
        for left in places(size[1], tile, overlap):
            part = work(slice(top, top + tile), slice(left, left + tile))
            if y is None:
                y = part.new_zeros(*part.shape[:2], *whole)
                total = total.to(part)
            (i, j), (h, w) = (scale * top, scale * left), part.shape[-2:]
            down = ramp(h, i == 0, i + h == whole[0], scale * overlap)
            across = ramp(w, j == 0, j + w == whole[1], scale * overlap)
            counts = torch.outer(down, across).to(part)
            y[..., i : i + h, j : j + w] += counts * part
            total[i : i + h, j : j + w] += counts
    assert y is not None  # there is one tile at least
    return y.div_(total)


def keep_memory() -> None:
    """Let this process keep what it frees, for its next maps, where the C library is
    glibc; elsewhere nothing happens.

    Its page faults become fewer, and it ends with the most memory that it ever had.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if mallopt := getattr(library, "mallopt", None):
        mallopt(-4, 0)  # M_MMAP_MAX: no request gets a piece of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back


def faster(network: nn.Module, sliced: bool | None = None) -> nn.Module:
    """Put a `FastAttention` in the place of every attention, in place; the weights stay
    the same tensors.

    sliced None: on a CPU in 16 bits, if `slices_win` there.
    """
    for module in [*network.modules()]:
        for name, part in module.named_children():
            if type(part) is Attention:
                weight = part.to_q.weight
                if sliced is None:
                    half = weight.dtype != torch.float32
                    on_cpu = weight.device.type == "cpu"
                    sliced = half and on_cpu and slices_win(weight.dtype)
                setattr(module, name, FastAttention(part, sliced))
    return network


class TiledVAE(VAE):
    """A VAE that sees one tile at a time: its memory does not grow with the picture.

    It shares the weights of the VAE that it replaces. tile, overlap: in latents. A tile
    has its own GroupNorm and its own attention, so the answer is not quite that of the
    whole; the overlap hides where one tile ends. A picture no larger than a tile comes
    out the same.
    """

    def __init__(self, vae: VAE, tile: int = 64, overlap: int = 16):
        nn.Module.__init__(self)
        if not 0 < overlap <= tile // 2:
            raise ValueError(
                f"tiles of {tile} cannot overlap by {overlap}: "
                "give an overlap from 1 to half of a tile"
            )
        self.config, self.tile, self.overlap = vae.config, tile, overlap
        self.factor = 2 ** (len(vae.config.channels) - 1)
        for name, part in vae.named_children():
            setattr(self, name, part)

    def unscaled(self, image: Tensor) -> DiagonalGaussian:
        """As VAE.unscaled."""
        f, (height, width) = self.factor, image.shape[-2:]
        if height % f or width % f or max(height, width) <= f * self.tile:
            return super().unscaled(image)  # it says what is wrong with a side

        def moments(rows: slice, columns: slice) -> Tensor:
            y, x = (slice(f * s.start, f * s.stop) for s in (rows, columns))
            return self.quant_conv(self.encoder(image[..., y, x]))

        size = height // f, width // f
        return DiagonalGaussian(tiled(moments, size, self.tile, self.overlap, 1))

    def decode(self, latents: Tensor) -> Tensor:
        """As VAE.decode."""

        def pixels(rows: slice, columns: slice) -> Tensor:
            return VAE.decode(self, latents[..., rows, columns])

        size = latents.shape[-2], latents.shape[-1]
        return tiled(pixels, size, self.tile, self.overlap, self.factor)


def compile_unet(network: nn.Module, whole: bool = True) -> nn.Module:
    """Let PyTorch write programs for a U-Net when it first runs, in place.

    Small operations are joined. whole: one program for all of it; else one for each
    block. It takes minutes, and again for each new size of the latents. Raises
    ValueError where a CPU's compiler is missing.
    """
    on_cpu = next(network.parameters()).device.type == "cpu"
    if on_cpu and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        raise ValueError(
            "compiling for a CPU wants a C++ compiler, and none is there: "
            "install g++, or do not compile"
        )
    torch._dynamo.config.recompile_limit = 64  # blocks have one code and many sizes
    for part in network.modules():
        if isinstance(part, FastAttention):
            # what is remembered changes
            part.words = part.keys_and_values  # type: ignore[method-assign]
    blocks = [
        part
        for part in network.modules()
        if isinstance(part, ResBlock | SpatialTransformer)
    ]
    for part in [network] if whole else blocks:
        part.compile(dynamic=False)
    return network


def speed_up(
    sd: StableDiffusion,
    fast: bool = False,
    tiled: bool = False,
    compiled: bool = False,
    int8: bool = False,
) -> StableDiffusion:
    """Switch on, in place, what a finished model can do: attention in its fast form, a
    VAE in tiles, a compiled U-Net, weights in 8 bits."""
    for network in sd.networks().values():
        if fast:
            faster(network)
        if int8:
            in_eight_bits(network)
    if tiled:
        sd.parts["vae"] = TiledVAE(sd.parts["vae"])
    if compiled:
        compile_unet(sd.parts["unet"])
    return sd
