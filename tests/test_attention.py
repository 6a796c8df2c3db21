"""Attention: equal to torch and diffusers on the same weights, and blind to the future where it should be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdlearn.attention import Attention


def by_hand(layer, x, context=None, causal=False):
    """Softmax of query times key, head by head."""
    context = x if context is None else context
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    width = q.shape[-1] // layer.heads
    heads = []
    for n in range(layer.heads):
        cut = slice(n * width, (n + 1) * width)
        scores = q[..., cut] @ k[..., cut].transpose(1, 2) / width**0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        heads.append(scores.softmax(dim=-1) @ v[..., cut])
    return layer.to_out(torch.cat(heads, dim=-1))


@settings(deadline=None, max_examples=40)
@given(
    heads=st.integers(1, 4), head_width=st.integers(1, 9), batch=st.integers(1, 3), tokens=st.integers(1, 9),
    seen=st.integers(1, 9), context_width=st.integers(1, 20), bias=st.booleans(),
    kind=st.sampled_from(["self", "causal", "cross"]),
)  # fmt: skip
def test_equals_the_hand_written_form(heads, head_width, batch, tokens, seen, context_width, bias, kind):
    width = heads * head_width
    layer = Attention(width, heads, context_width if kind == "cross" else None, bias)
    x = torch.randn(batch, tokens, width)
    context = torch.randn(batch, seen, context_width) if kind == "cross" else None
    y = layer(x, context, causal=kind == "causal")
    assert y.shape == x.shape
    torch.testing.assert_close(y, by_hand(layer, x, context, kind == "causal"), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def as_torch(layer):
    width, seen = layer.to_k.weight.shape
    other = nn.MultiheadAttention(width, layer.heads, kdim=seen, vdim=seen, batch_first=True)
    parts = (layer.to_q, layer.to_k, layer.to_v)
    if seen == width:
        other.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    else:
        for name, part in zip("qkv", parts, strict=True):
            getattr(other, f"{name}_proj_weight").copy_(part.weight)
    other.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    other.out_proj.load_state_dict(layer.to_out.state_dict())
    return other


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_equals_torch(causal):
    layer, x = Attention(96, 6, bias=True), torch.randn(2, 77, 96)
    mask = torch.ones(77, 77, dtype=torch.bool).triu(1) if causal else None
    reference, _ = as_torch(layer)(x, x, x, attn_mask=mask)
    assert (layer(x, causal=causal) - reference).abs().max() <= 1e-5


@torch.no_grad()
def test_cross_attention_equals_torch():
    layer, x, context = Attention(96, 6, context_width=40, bias=True), torch.randn(2, 16, 96), torch.randn(2, 77, 40)
    reference, _ = as_torch(layer)(x, context, context)
    assert (layer(x, context) - reference).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("context_width", [None, 768])
def test_equals_diffusers_at_the_u_nets_size(context_width):
    from diffusers.models.attention_processor import Attention as Reference

    ours = Attention(320, 8, context_width)
    reference = Reference(query_dim=320, cross_attention_dim=context_width, heads=8, dim_head=40)
    reference.load_state_dict({name.replace("to_out.", "to_out.0."): p for name, p in ours.state_dict().items()})
    x = torch.randn(1, 256, 320)
    context = torch.randn(1, 77, 768) if context_width else None
    assert (ours(x, context) - reference(x, context)).abs().max() <= 1e-5


@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(2, 12), data=st.data())
def test_the_future_is_invisible(tokens, data):
    changed = data.draw(st.integers(1, tokens - 1))
    layer, x = Attention(24, 3), torch.randn(1, tokens, 24)
    other = x.clone()
    other[:, changed:] = 100 * torch.randn_like(other[:, changed:])
    with torch.no_grad():
        torch.testing.assert_close(layer(x, causal=True)[:, :changed], layer(other, causal=True)[:, :changed])
        assert not torch.allclose(layer(x, causal=True)[:, changed:], layer(other, causal=True)[:, changed:])


def test_no_derivative_reaches_back_from_the_future():
    layer, x = Attention(8, 2), torch.randn(1, 6, 8)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x, causal=True), x)[0, :, :, 0]
    influence = jacobian.norm(dim=(1, 3))
    assert influence.triu(1).count_nonzero() == 0
    assert influence.tril().count_nonzero() == 21


def test_knows_no_order():
    layer, x, shuffled = Attention(24, 3), torch.randn(2, 9, 24), torch.randperm(9)
    torch.testing.assert_close(layer(x)[:, shuffled], layer(x[:, shuffled]), atol=1e-6, rtol=1e-5)


def test_heads_are_contiguous_pieces_of_the_width():
    x = torch.arange(2 * 5 * 12).reshape(2, 5, 12)
    heads = Attention(12, 3).split_heads(x)
    assert heads.shape == (2, 3, 5, 4)
    assert heads[1, 2, 3].tolist() == x[1, 3, 8:].tolist()


@pytest.mark.parametrize(("arguments", "parameters"), [
    ((1280, 8), 4 * 1280**2 + 1280),
    ((320, 8, 768), 2 * 320**2 + 2 * 768 * 320 + 320),
    ((768, 12, None, True), 4 * (768**2 + 768)),
])  # fmt: skip
def test_parameters(arguments, parameters):
    assert sum(p.numel() for p in Attention(*arguments).parameters()) == parameters


def test_backward_reaches_every_weight():
    layer = Attention(16, 2, context_width=8)
    layer(torch.randn(1, 4, 16), torch.randn(1, 3, 8)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("heads", [0, -1, 5])
def test_heads_must_divide_the_width(heads):
    with pytest.raises(ValueError, match=f"width 12 does not split into {heads} heads"):
        Attention(12, heads)


def test_causal_attention_has_no_context():
    with pytest.raises(ValueError, match="leave out context or causal"):
        Attention(12, 2)(torch.randn(1, 4, 12), torch.randn(1, 3, 12), causal=True)
