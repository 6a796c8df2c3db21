"""The U-Net against diffusers at small sizes (chapter 07 compares the full one), its invariants, recorded attention."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdlearn.blocks import Downsample
from sdlearn.tiny.recipe import UNET_SIZES
from sdlearn.unet import GEGLU, SpatialTransformer, Stage, UNet, UNetConfig, attention_maps, record_attention

SMALL = UNetConfig(channels=(32, 64), attention=(True, False), heads=(4, 4), blocks=1, context_width=24, groups=8)
LIKE_SD15 = UNetConfig(channels=(32, 64, 96, 96), context_width=48)  # SD 1.5's pattern, a tenth of its width


def reference_name(name: str, blocks: int) -> str:
    """Our name of a weight -> the name in diffusers."""
    for ours, theirs in (("to_out", "to_out.0"), ("ff.proj", "ff.net.0.proj"), ("ff.out", "ff.net.2")):
        name = name.replace(f".{ours}.", f".{theirs}.")
    name = name.replace("middle.resnets", "mid_block.resnets").replace("middle.attention", "mid_block.attentions.0")
    part, index, *rest = name.split(".")
    if part not in ("down", "up"):
        return name
    level, i = divmod(int(index), blocks + 1 + (part == "up"))
    kind = {"resnet": f"resnets.{i}", "attention": f"attentions.{i}", "conv": f"{part}samplers.0.conv"}[rest[0]]
    return ".".join([f"{part}_blocks", str(level), kind, *rest[1:]])


def reference(config: UNetConfig) -> UNet2DConditionModel:
    kinds = ["CrossAttn" if attention else "" for attention in config.attention]
    return UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.channels,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in kinds[::-1]],
        layers_per_block=config.blocks,
        cross_attention_dim=config.context_width,
        attention_head_dim=config.heads,
        norm_num_groups=config.groups,
    )


def lively(model: nn.Module) -> dict[str, torch.Tensor]:
    """Random weights that hide nothing: matrices keep the variance, norms and biases are not 1 and 0."""
    weights = {}
    for name, p in model.state_dict().items():
        noise = torch.randn(p.shape)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weights[name] = noise * p[0].numel() ** -0.5 if p.ndim > 1 else centre + 0.2 * noise
    return weights


def inputs(config: UNetConfig, batch: int = 2, height: int = 16, width: int = 16):
    t = torch.tensor([0, 250, 999])[torch.arange(batch) % 3]
    return torch.randn(batch, config.in_channels, height, width), t, torch.randn(batch, 77, config.context_width)


def pair(config: UNetConfig) -> tuple[UNet, UNet2DConditionModel]:
    with torch.device("meta"):
        ours, theirs = UNet(config), reference(config)
    weights = lively(ours)
    ours.load_state_dict(weights, assign=True)
    theirs.load_state_dict({reference_name(k, config.blocks): v for k, v in weights.items()}, assign=True)
    return ours, theirs


@torch.no_grad()
def difference(ours, theirs, arguments) -> float:
    latents, t, context = arguments
    answer = theirs(latents, t, context).sample
    assert answer.std() > 0.1  # not a comparison of nothing with nothing
    return (ours(latents, t, context) - answer).abs().max().item()


@pytest.mark.parametrize("config", [UNET_SIZES, SMALL, LIKE_SD15], ids=["tiny", "small", "like SD 1.5"])
def test_equals_diffusers(config):
    ours, theirs = pair(config)
    assert difference(ours, theirs, inputs(config, 3)) <= 1e-4
    assert difference(ours, theirs, inputs(config, 1, height=8, width=24)) <= 1e-4
    assert difference(ours, theirs, inputs(config, 1, height=9, width=14)) <= 1e-4  # no multiples of 2 or 4


def exchange_halves(layer, dim):
    half = layer.weight.shape[dim] // 2
    layer.weight = nn.Parameter(layer.weight.roll(half, dim))
    if dim == 0:
        layer.bias = nn.Parameter(layer.bias.roll(half))


def spoil_time(unet):
    exchange_halves(unet.time_embedding.linear_1, 1)


def spoil_gates(unet):
    for part in unet.modules():
        if isinstance(part, GEGLU):
            exchange_halves(part.proj, 0)


def spoil_padding(unet):
    for part in unet.modules():
        if isinstance(part, Downsample):
            part.asymmetric, part.conv.padding = True, (0, 0)


def spoil_heads(unet):
    for part in unet.modules():
        if isinstance(part, SpatialTransformer):
            part.transformer_blocks[0].attn1.heads = 2


@pytest.mark.parametrize("spoil", [spoil_time, spoil_gates, spoil_padding, spoil_heads])
def test_the_comparison_sees_planted_faults(spoil):
    ours, theirs = pair(SMALL)
    spoil(ours)
    assert difference(ours, theirs, inputs(SMALL)) > 1e-2


def test_norms_have_the_references_epsilons():
    """Random weights hardly show them, trained ones do."""
    ours, theirs = pair(SMALL)
    theirs = dict(theirs.named_modules())
    norms = {name: part for name, part in ours.named_modules() if isinstance(part, nn.GroupNorm | nn.LayerNorm)}
    assert len(norms) > 20
    for name, part in norms.items():
        assert part.eps == theirs[reference_name(f"{name}.weight", SMALL.blocks).removesuffix(".weight")].eps, name


def test_parameters_of_stable_diffusion():
    with torch.device("meta"):
        ours, theirs = UNet(UNetConfig()), reference(UNetConfig())
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964
    shapes = {reference_name(k, 2): p.shape for k, p in ours.state_dict().items()}
    assert len(shapes) == 686
    assert shapes == {k: p.shape for k, p in theirs.state_dict().items()}


LEVELS = st.lists(st.tuples(st.sampled_from([8, 16, 24]), st.booleans()), min_size=1, max_size=3)


@settings(deadline=None, max_examples=15)
@given(levels=LEVELS, blocks=st.integers(1, 2), height=st.integers(1, 3), width=st.integers(1, 3))
def test_every_config_gives_back_the_shape(levels, blocks, height, width):
    channels, attention = zip(*levels, strict=True)
    heads = (2,) * len(levels)
    config = UNetConfig(channels, attention, heads, blocks, context_width=6, in_channels=5, out_channels=3, groups=4)
    unet, step = UNet(config), 2 ** (len(levels) - 1)
    ups = sum(isinstance(part, Stage) for part in unet.up)
    assert ups == len(unet.down) + 1  # each map of the way down, and the first one, is taken back exactly once
    latents, t, context = inputs(config, 2, height * step, width * step)
    assert unet(latents, t, context).shape == (2, 3, height * step, width * step)


@torch.no_grad()
def test_an_example_does_not_see_its_batch():
    unet = UNet(SMALL)
    latents, t, context = inputs(SMALL, 3)
    together = unet(latents, t, context)
    alone = torch.cat([unet(latents[i : i + 1], t[i : i + 1], context[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("t", [500, torch.tensor(500), torch.tensor([500])], ids=["int", "scalar", "one"])
def test_one_time_serves_the_batch(t):
    unet = UNet(SMALL)
    latents, _, context = inputs(SMALL)
    assert torch.equal(unet(latents, t, context), unet(latents, torch.tensor([500, 500]), context))


@torch.no_grad()
def test_time_and_every_word_matter():
    unet = UNet(SMALL)
    latents, t, context = inputs(SMALL)
    answer = unet(latents, t, context)
    assert not torch.allclose(answer, unet(latents, t + 100, context), atol=1e-5)
    context[:, -1] += 1
    assert not torch.allclose(answer, unet(latents, t, context), atol=1e-7)


@torch.no_grad()
def test_half_precision():
    unet = UNet(SMALL).to(torch.bfloat16)
    latents, t, context = inputs(SMALL)
    assert unet(latents.bfloat16(), t, context.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("wrong, message", [
    ({"heads": (4,)}, "one entry a level"),
    ({"channels": (32, 60)}, "60 channels do not split into 8 groups"),
])  # fmt: skip
def test_a_wrong_config_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{"channels": (32, 64), "attention": (True, False), "heads": (4, 4), "groups": 8, **wrong})


def test_wrong_inputs_are_refused():
    unet = UNet(UNET_SIZES)
    latents, t, context = inputs(UNET_SIZES)
    with pytest.raises(ValueError, match="latents have 3 channels, but this U-Net takes 4"):
        unet(latents[:, :3], t, context)
    with pytest.raises(ValueError, match="context is 100 wide, but this U-Net reads 192"):
        unet(latents, t, context[..., :100])


@torch.no_grad()
def test_recorded_attention():
    unet = UNet(UNET_SIZES)
    arguments = inputs(UNET_SIZES)
    before, finished = unet(*arguments), {}
    hooks = [
        part.register_forward_hook(lambda part, args, y, name=name: finished.update({name: (part, args[1], y)}))
        for name, part in unet.named_modules()
        if name.endswith("attn2")
    ]
    with record_attention(unet) as maps:
        assert torch.equal(unet(*arguments), before)
    for hook in hooks:
        hook.remove()
    assert len(maps) == 7  # two stages down, the middle, four stages up
    assert maps["down.2.attention.transformer_blocks.0.attn2"].shape == (2, 6, 64, 77)
    assert maps["middle.attention.transformer_blocks.0.attn2"].shape == (2, 7, 16, 77)
    for name, p in maps.items():
        assert torch.allclose(p.sum(-1), torch.ones(()), atol=1e-5)
        part, context, y = finished[name]  # the probabilities are the layer's own: with them its work can be redone
        by_hand = part.to_out((p @ part.split_heads(part.to_v(context))).transpose(1, 2).flatten(2))
        assert torch.allclose(by_hand, y, atol=1e-5)


def hooks_of(unet: nn.Module) -> int:
    return sum(len(part._forward_hooks) for part in unet.modules())


@torch.no_grad()
def test_hooks_are_removed():
    unet = UNet(SMALL)
    with record_attention(unet) as maps:
        assert hooks_of(unet) == 4  # one stage down, the middle, two stages up
        unet(*inputs(SMALL))
    assert hooks_of(unet) == 0
    kept = {name: p.clone() for name, p in maps.items()}
    unet(*inputs(SMALL))
    assert all(torch.equal(maps[name], p) for name, p in kept.items())
    with pytest.raises(ValueError), record_attention(unet):
        unet(torch.zeros(1, 3, 16, 16), 0, torch.zeros(1, 77, 24))
    assert hooks_of(unet) == 0


@torch.no_grad()
def test_several_calls_are_averaged():
    unet = UNet(SMALL)
    calls, single = [inputs(SMALL) for _ in range(3)], []
    for arguments in calls:
        with record_attention(unet) as maps:
            unet(*arguments)
        single.append(maps)
    with record_attention(unet) as maps:
        for arguments in calls:
            unet(*arguments)
    for name, p in maps.items():
        assert torch.allclose(p, sum(one[name] for one in single) / 3, atol=1e-6)


def test_recording_holds_no_gradients_but_training_goes_on():
    unet = UNet(SMALL)
    with record_attention(unet) as maps:
        unet(*inputs(SMALL)).square().mean().backward()
    assert not any(p.requires_grad for p in maps.values())
    assert all(p.grad is not None for p in unet.parameters())


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(16, 16), (8, 24)])
def test_attention_maps(height, width):
    unet = UNet(SMALL)
    with record_attention(unet) as maps:
        unet(*inputs(SMALL, 2, height, width))
    for scale in (1, 8):
        words = attention_maps(maps, (scale * height, scale * width))
        assert words.shape == (2, 77, scale * height, scale * width)
        assert torch.allclose(words.sum(1), torch.ones(()), atol=1e-5)
    one = {name: p for name, p in maps.items() if name.startswith("down.0")}
    (p,) = one.values()
    expected = p.mean(1).transpose(1, 2).reshape(2, 77, height, width)
    assert torch.allclose(attention_maps(one, (height, width)), expected, atol=1e-6)


def test_attention_maps_keep_the_place():
    """A token that is looked for in one corner only lights up that corner, at every size."""
    p = torch.zeros(1, 1, 4 * 6, 2)
    p[..., 1] = 1
    p[0, 0, 5] = torch.tensor([1.0, 0.0])  # first row, last column
    heat = attention_maps({"layer": p}, (32, 48))[0, 0]
    assert heat[:8, 40:].mean() > 0.5
    assert heat[16:].abs().max() == 0 and heat[:, :24].abs().max() == 0


def test_attention_maps_refuse():
    with pytest.raises(ValueError, match="nothing was recorded"):
        attention_maps({}, (16, 16))
    for size in ((16, 16), (16, 15), (1, 100)):
        with pytest.raises(ValueError, match="give the latents' size"):
            attention_maps({"layer": torch.ones(1, 1, 96, 1)}, size)


@torch.no_grad()
def test_residuals_are_added_to_what_is_kept_and_to_the_middle():
    torch.manual_seed(0)
    unet = UNet(UNET_SIZES).eval()
    xt, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 77, UNET_SIZES.context_width)
    seen = []
    hooks = [part.register_forward_hook(lambda *call: seen.append(call[-1])) for part in (unet.conv_in, *unet.down)]
    plain = unet(xt, t, context)
    for hook in hooks:
        hook.remove()
    shapes = [x.shape for x in (*seen, seen[-1])]
    assert torch.equal(unet(xt, t, context, residuals=[torch.zeros(shape) for shape in shapes]), plain)
    for i in range(len(shapes)):  # each of them counts, and the first only on the way up
        one = [torch.full(shape, float(i == j)) for j, shape in enumerate(shapes)]
        assert (unet(xt, t, context, residuals=one) - plain).abs().max() > 1e-4
    with pytest.raises(ValueError, match="zip"):
        unet(xt, t, context, residuals=one[:-1])
