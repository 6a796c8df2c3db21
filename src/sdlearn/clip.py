"""tokens -> context: CLIP's two towers, and the contrastive loss. Chapter 03.
Exported from book/03_clip.ipynb by `make export`; edit it there.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlearn.attention import Attention


def contrastive_loss(logits: Tensor) -> Tensor:
    """Text i belongs to image i: cross-entropy of rows and columns, averaged.

    logits: (B, B), texts in rows.
    """
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the form of GELU that CLIP was trained with.

    Hendrycks & Gimpel 2016, section 2.
    """
    return x * torch.sigmoid(1.702 * x)


class CLIPLayer(nn.Module):
    """A pre-LayerNorm layer: attention and an MLP, a residual connection around each.

    exact_gelu: between them the true GELU, as in OpenCLIP, not CLIP's QuickGELU.
    """

    def __init__(self, width: int, heads: int, exact_gelu: bool = False):
        super().__init__()
        self.exact_gelu = exact_gelu
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = Attention(width, heads, bias=True)
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal=causal)
        gelu = F.gelu if self.exact_gelu else quick_gelu
        return x + self.fc2(gelu(self.fc1(self.layer_norm2(x))))


@dataclass(frozen=True)
class CLIPTextConfig:
    """The sizes of a text encoder; the defaults are CLIP ViT-L/14's, as in SD 1.5."""

    vocab: int = 49408
    positions: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    exact_gelu: bool = False  # OpenCLIP: GELU in place of QuickGELU
    projection: int = 0  # width of a text_projection of its own; 0: it has none
    end: int = -1  # the id of the end token; -1: the last of the vocabulary

    def __post_init__(self) -> None:
        if self.end == -1:
            object.__setattr__(self, "end", self.vocab - 1)


class CLIPTextEncoder(nn.Module):
    """tokens (B, S) -> context (B, S, D): each token, knowing those before it.

    Radford et al. 2021, section 2.4.
    """

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab, config.width)
        self.position_embedding = nn.Embedding(config.positions, config.width)
        self.layers = nn.ModuleList(
            CLIPLayer(config.width, config.heads, config.exact_gelu)
            for _ in range(config.layers)
        )
        self.final_layer_norm = nn.LayerNorm(config.width)
        if config.projection:
            self.text_projection = nn.Linear(config.width, config.projection, False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def hidden_states(self, tokens: Tensor) -> list[Tensor]:
        """The embedding and each layer's output: layers + 1 tensors (B, S, D).

        None of them has been through the final LayerNorm.
        """
        length, positions = tokens.shape[-1], self.config.positions
        if length > positions:
            raise ValueError(
                f"{length} tokens do not fit into {positions} positions: truncate them"
            )
        x = self.token_embedding(tokens) + self.position_embedding.weight[:length]
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], causal=True))
        return states

    def forward(self, tokens: Tensor, skip: int = 0) -> Tensor:
        """The context; `skip` leaves out that many of the last layers ("clip skip")."""
        if not 0 <= skip <= self.config.layers:
            raise ValueError(
                f"skip is {skip}: choose 0 to {self.config.layers}, "
                "the number of layers to leave out"
            )
        return self.final_layer_norm(self.hidden_states(tokens)[-1 - skip])

    def pool(self, tokens: Tensor, context: Tensor) -> Tensor:
        """The context (B, D) at the first end token, which has seen the whole text."""
        end = (tokens == self.config.end).int().argmax(dim=-1)
        return context[torch.arange(len(context), device=context.device), end]


@dataclass(frozen=True)
class CLIPImageConfig:
    """The sizes of an image tower; the defaults are CLIP ViT-L/14's.

    OpenAI's weights want pictures with their own mean and deviation, not [-1, 1].
    """

    size: int = 224
    patch: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16


class CLIPImageEncoder(nn.Module):
    """image (B, 3, size, size) -> one vector (B, D): a Vision Transformer.

    Dosovitskiy et al. 2021, section 3.1.
    """

    def __init__(self, config: CLIPImageConfig):
        super().__init__()
        self.config = config
        scale = config.width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(config.width))
        self.patch_embedding = nn.Conv2d(
            3, config.width, config.patch, stride=config.patch, bias=False
        )
        self.position_embedding = nn.Embedding(
            (config.size // config.patch) ** 2 + 1, config.width
        )
        self.pre_layernorm = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(
            CLIPLayer(config.width, config.heads) for _ in range(config.layers)
        )
        self.post_layernorm = nn.LayerNorm(config.width)
        nn.init.normal_(self.position_embedding.weight, std=scale)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if (height, width) != (self.config.size, self.config.size):
            raise ValueError(
                f"the picture is {width}x{height}, "
                f"this tower sees {self.config.size} squared: resize it"
            )
        patches = self.patch_embedding(image).flatten(2).transpose(1, 2)  # (B, T, D)
        first = self.class_embedding.expand(len(image), 1, -1).to(patches)
        x = self.pre_layernorm(
            torch.cat([first, patches], dim=1) + self.position_embedding.weight
        )
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x[:, 0])


class CLIP(nn.Module):
    """Two towers: a picture and its sentence point in the same direction.

    Radford et al. 2021, figure 3.
    """

    def __init__(self, text: CLIPTextConfig, image: CLIPImageConfig, projection: int):
        super().__init__()
        self.text_encoder = CLIPTextEncoder(text)
        self.image_encoder = CLIPImageEncoder(image)
        self.text_projection = nn.Linear(text.width, projection, bias=False)
        self.visual_projection = nn.Linear(image.width, projection, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.text_projection.weight, std=text.width**-0.5)
        nn.init.normal_(self.visual_projection.weight, std=image.width**-0.5)

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Unit vectors (B, projection)."""
        pooled = self.text_encoder.pool(tokens, self.text_encoder(tokens))
        return F.normalize(self.text_projection(pooled), dim=-1)

    def embed_image(self, image: Tensor) -> Tensor:
        """Unit vectors (B, projection) of pictures in [-1, 1]."""
        return F.normalize(self.visual_projection(self.image_encoder(image)), dim=-1)

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Scaled cosines (texts, images)."""
        return (
            self.logit_scale.exp().clamp(max=100.0)
            * self.embed_text(tokens)
            @ self.embed_image(image).T
        )
