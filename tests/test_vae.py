"""The VAE equals diffusers', has Stable Diffusion 1.5's size, and treats its latents as promised."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlearn.tiny.recipe import VAE_SIZES
from sdlearn.vae import VAE, DiagonalGaussian, VAEConfig

SIZES = replace(VAE_SIZES, scale=0.9)  # the tiny model's; its scale was measured
MINI = VAEConfig((8, 16), blocks=1, groups=4)
THEIRS_TO_OURS = {
    "down_blocks": "levels",
    "up_blocks": "levels",
    "downsamplers.0": "resample",
    "upsamplers.0": "resample",
    "mid_block.attentions.0.group_norm": "middle.attention.group_norm",
    "mid_block.attentions.0": "middle.attention.attention",
    "mid_block": "middle",
    "to_out.0": "to_out",
    "conv_norm_out": "norm_out",
}


def our_name(name: str) -> str:
    for theirs, ours in THEIRS_TO_OURS.items():
        name = name.replace(theirs, ours)
    return name


@pytest.fixture(scope="module")
def pair():
    """diffusers' tiny VAE with shaken random weights, and ours with the same ones."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    theirs = AutoencoderKL(
        block_out_channels=SIZES.channels, layers_per_block=SIZES.blocks, norm_num_groups=SIZES.groups,
        latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    ours = VAE(SIZES).eval()
    ours.load_state_dict({our_name(name): value for name, value in theirs.state_dict().items()})
    return theirs, ours


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(64, 64), (32, 72)])
def test_equals_diffusers(pair, height, width):
    theirs, ours = pair
    image, latents = torch.rand(2, 3, height, width) * 2 - 1, torch.randn(2, 4, height // 8, width // 8)
    wanted, cloud = theirs.encode(image).latent_dist, ours.encode(image)
    assert cloud.mean.std() > 0.05 and cloud.logvar.std() > 0.05
    assert (cloud.mean - SIZES.scale * wanted.mean).abs().max() <= 1e-4
    assert (cloud.logvar - wanted.logvar - 2 * math.log(SIZES.scale)).abs().max() <= 1e-4
    torch.testing.assert_close(ours.unscaled(image).kl(), wanted.kl(), rtol=1e-4, atol=1e-4)
    again = theirs.decode(latents / SIZES.scale).sample
    assert again.std() > 0.05
    assert (ours.decode(latents) - again).abs().max() <= 1e-4


@torch.no_grad()
def test_draws_equal_diffusers(pair):
    theirs, ours = pair
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    wanted = theirs.encode(image).latent_dist.sample(torch.Generator().manual_seed(5))
    mine = ours.encode(image).sample(torch.Generator().manual_seed(5))
    assert (mine - SIZES.scale * wanted).abs().max() <= 1e-4


def test_full_size_has_the_published_counts():
    with torch.device("meta"):
        vae = VAE(VAEConfig())
        assert vae.encode(torch.empty(1, 3, 512, 512)).mean.shape == (1, 4, 64, 64)
        assert vae.decode(torch.empty(1, 4, 64, 64)).shape == (1, 3, 512, 512)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    tensors = {name: len(part.state_dict()) for name, part in vae.named_children()}
    assert tensors == {"encoder": 106, "decoder": 138, "quant_conv": 2, "post_quant_conv": 2}


def test_config_is_stable_diffusions_and_frozen():
    assert VAEConfig().scale == 0.18215
    with pytest.raises(FrozenInstanceError):
        VAEConfig().scale = 1.0


def test_every_norm_has_the_vaes_eps():
    norms = [m for m in VAE(MINI).modules() if isinstance(m, torch.nn.GroupNorm)]
    assert norms and all(norm.eps == 1e-6 for norm in norms)


@pytest.mark.parametrize("height, width", [(100, 96), (96, 100), (7, 8)])
def test_sizes_that_do_not_divide_are_refused(pair, height, width):
    with pytest.raises(ValueError, match=f"{width}x{height}.*multiples of 8"):
        pair[1].encode(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("channels", [1, 4])
def test_images_that_are_not_rgb_are_refused(pair, channels):
    with pytest.raises(ValueError, match=f"{channels} channels.*RGB"):
        pair[1].encode(torch.zeros(1, channels, 16, 16))


@torch.no_grad()
def test_decode_divides_by_the_scale_and_leaves_the_latents_alone():
    vae = VAE(MINI)
    latents = torch.randn(1, 4, 8, 8)
    before = latents.clone()
    scaled = vae.decode(latents)
    assert torch.equal(latents, before)
    vae.config = replace(MINI, scale=1.0)
    torch.testing.assert_close(scaled, vae.decode(latents / MINI.scale))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_follows_the_dtype_of_its_input(dtype):
    vae = VAE(MINI).to(dtype)
    latents = vae.encode(torch.zeros(1, 3, 16, 16, dtype=dtype)).sample()
    assert latents.dtype == dtype and vae.decode(latents).dtype == dtype


@torch.no_grad()
def test_one_picture_does_not_depend_on_its_neighbours():
    vae = VAE(MINI)
    image = torch.rand(3, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(vae.encode(image).mean[1:2], vae.encode(image[1:2]).mean, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_weight_through_the_draw():
    vae = VAE(MINI)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    (vae.decode(vae.encode(image).sample()) - image).square().mean().backward()
    # softmax cancels what all keys share, so their bias alone has no gradient
    silent = {name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 1e-7}
    assert silent <= {f"{part}.middle.attention.attention.to_k.bias" for part in ("encoder", "decoder")}


def test_the_trick_gives_the_true_gradients():
    moments = torch.zeros(1, 2, 200, 200, requires_grad=True)  # mean 0, std 1 everywhere
    loss = ((DiagonalGaussian(moments).sample(torch.Generator().manual_seed(0)) - 2) ** 2).sum()
    loss.backward()
    mean, logvar = moments.grad.mean(dim=(0, 2, 3)).tolist()
    assert mean == pytest.approx(-4, abs=0.05)  # 2 (mean - 2)
    assert logvar == pytest.approx(1, abs=0.05)  # 2 std * dstd/dlogvar = 2 * 1 * 1/2


def test_a_seed_means_the_same_draw():
    cloud = DiagonalGaussian(torch.randn(1, 8, 4, 4))
    first, second = (cloud.sample(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, cloud.sample(torch.Generator().manual_seed(4)))


def test_the_log_variance_is_clamped():
    cloud = DiagonalGaussian(torch.tensor([1.0, 2.0, -1e9, 1e9]).view(1, 4, 1, 1))
    assert cloud.mean.flatten().tolist() == [1.0, 2.0]
    assert cloud.logvar.flatten().tolist() == [-30.0, 20.0]
    assert cloud.sample().isfinite().all() and cloud.kl().isfinite().all()


@settings(deadline=None, max_examples=40)
@given(st.floats(-5, 5), st.floats(-6, 3))
def test_kl_is_the_divergence_and_never_negative(mean, logvar):
    moments = torch.tensor([mean, logvar], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    cloud = torch.distributions.Normal(torch.tensor(mean, dtype=torch.float64), math.exp(logvar / 2))
    wanted = 9 * torch.distributions.kl_divergence(cloud, torch.distributions.Normal(0.0, 1.0))
    kl = DiagonalGaussian(moments).kl()
    assert kl.shape == (1,) and kl.item() >= -1e-12
    assert kl.item() == pytest.approx(wanted.item(), abs=1e-5)


def test_kl_is_zero_at_the_prior_and_summed_for_each_picture():
    assert DiagonalGaussian(torch.zeros(2, 8, 4, 4)).kl().tolist() == [0.0, 0.0]
    moments = torch.zeros(2, 8, 4, 4)
    moments[1, :4] = 1.0  # 64 means of one: half a nat each
    assert DiagonalGaussian(moments).kl().tolist() == [0.0, 32.0]
