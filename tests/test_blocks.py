"""The convolutional blocks equal diffusers' and keep their promises about shapes, time and padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdlearn.blocks import AttentionBlock, Downsample, ResBlock, Upsample


def shake(module: nn.Module) -> nn.Module:
    """Move norms and biases away from ones and zeros, so that every one of them counts."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def assert_close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert mine.shape == theirs.shape
    assert mine.std() > 0.1  # a comparison of zeros would prove nothing
    assert (mine - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("out_channels", [32, 48])
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_resblock_equals_diffusers(out_channels, eps):
    from diffusers.models.resnet import ResnetBlock2D

    theirs = shake(ResnetBlock2D(in_channels=32, out_channels=out_channels, temb_channels=None, groups=8, eps=eps))
    mine = ResBlock(32, out_channels, groups=8, eps=eps)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 32, 9, 7)
    assert_close(mine(x), theirs(x, None))


def test_resblock_with_time_equals_diffusers():
    from diffusers.models.resnet import ResnetBlock2D

    theirs = shake(ResnetBlock2D(in_channels=32, out_channels=64, temb_channels=20, groups=8, eps=1e-5))
    mine = ResBlock(32, 64, groups=8, eps=1e-5, time_width=20)
    mine.load_state_dict(theirs.state_dict())
    x, time = torch.randn(3, 32, 8, 8), torch.randn(3, 20)
    assert_close(mine(x, time), theirs(x, time))
    assert not torch.equal(mine(x, time), mine(x, time.roll(1, 0)))  # each picture has its own time


def test_resblock_does_not_pass_over_a_missing_time():
    with pytest.raises(AssertionError):
        ResBlock(16, 16, groups=4, time_width=20)(torch.randn(1, 16, 5, 5))


def test_resblock_default_eps_is_the_vaes():
    norms = [m for m in ResBlock(32, 64).modules() if isinstance(m, nn.GroupNorm)]
    assert [(norm.num_groups, norm.eps) for norm in norms] == [(32, 1e-6)] * 2


def test_resblock_lets_the_picture_pass():
    block = ResBlock(16, 16, groups=4)
    nn.init.zeros_(block.conv2.weight), nn.init.zeros_(block.conv2.bias)
    x = torch.randn(1, 16, 5, 5)
    assert torch.equal(block(x), x)
    assert isinstance(block.conv_shortcut, nn.Identity)
    assert isinstance(ResBlock(16, 32, groups=4).conv_shortcut, nn.Conv2d)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.sampled_from([(8, 8), (8, 16), (16, 8)]))
def test_one_picture_does_not_depend_on_its_neighbours(batch, height, width, channels):
    torch.manual_seed(0)
    block = nn.Sequential(shake(ResBlock(*channels, groups=4)), shake(AttentionBlock(channels[1], groups=4)))
    x = torch.randn(batch, channels[0], height, width)
    together = block(x)
    assert together.shape == (batch, channels[1], height, width)
    torch.testing.assert_close(together[:1], block(x[:1]), atol=1e-5, rtol=1e-5)


def test_attention_block_equals_diffusers():
    from diffusers.models.attention_processor import Attention

    theirs = Attention(
        64, heads=1, dim_head=64, norm_num_groups=8, eps=1e-6, residual_connection=True, bias=True,
        upcast_softmax=True, _from_deprecated_attn_block=True,
    )  # fmt: skip
    mine = AttentionBlock(64, groups=8)
    weights = {name.replace("to_out.0", "to_out"): value for name, value in shake(theirs).state_dict().items()}
    mine.load_state_dict(
        {name if name.startswith("group_norm") else f"attention.{name}": value for name, value in weights.items()}
    )
    x = torch.randn(2, 64, 6, 5)
    assert_close(mine(x), theirs(x))


def test_attention_block_sees_everywhere():
    block = shake(AttentionBlock(8, groups=2))
    x = torch.randn(1, 8, 6, 6, requires_grad=True)
    block(x)[0, :, 0, 0].sum().backward()
    assert (x.grad[0].abs().sum(0) > 0).all()


@pytest.mark.parametrize("asymmetric, padding", [(True, 0), (False, 1)])
def test_downsample_equals_diffusers(asymmetric, padding):
    from diffusers.models.downsampling import Downsample2D

    theirs = shake(Downsample2D(12, use_conv=True, padding=padding, name="op"))
    mine = Downsample(12, asymmetric)
    mine.load_state_dict({f"conv.{name}": value for name, value in theirs.conv.state_dict().items()})
    x = torch.randn(2, 12, 10, 8)
    assert_close(mine(x), theirs(x))
    assert mine(x).shape == (2, 12, 5, 4)


@pytest.mark.parametrize("asymmetric, centre", [(True, 7.0), (False, 0.0)])
def test_where_the_latents_look(asymmetric, centre):
    """Three halvings of a picture of column numbers: the two paddings differ by seven pixels."""
    down = nn.Sequential(*(Downsample(1, asymmetric) for _ in range(3)))
    for layer in down:
        nn.init.constant_(layer.conv.weight, 1 / 9), nn.init.zeros_(layer.conv.bias)
    looks_at = down(torch.arange(64.0).expand(1, 1, 64, 64))[0, 0, 4]
    torch.testing.assert_close(looks_at[2:6], 8.0 * torch.arange(2, 6) + centre)


def test_upsample_equals_diffusers():
    from diffusers.models.upsampling import Upsample2D

    theirs = shake(Upsample2D(12, use_conv=True))
    mine = Upsample(12)
    mine.load_state_dict({f"conv.{name}": value for name, value in theirs.conv.state_dict().items()})
    x = torch.randn(2, 12, 5, 4)
    assert_close(mine(x), theirs(x))
    assert mine(x).shape == (2, 12, 10, 8)
