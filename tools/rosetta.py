"""Names in three languages: book/rosetta.md, made from the maps of sdlearn.checkpoint.dialects at the sizes of SD 1.5.

python tools/rosetta.py            write the page
python tools/rosetta.py --check    write nothing; exit 1 if the page differs
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

from torch import nn

from sdlearn.blocks import AttentionBlock, ResBlock
from sdlearn.checkpoint.dialects import CLIP_RULES, PREFIXES, rename
from sdlearn.checkpoint.load import empty, rules
from sdlearn.clip import CLIPLayer, CLIPTextConfig, CLIPTextEncoder
from sdlearn.unet import SpatialTransformer, UNet, UNetConfig
from sdlearn.vae import VAE, VAEConfig

PAGE = Path(__file__).resolve().parent.parent / "book" / "rosetta.md"
LINKS = {path.name[:2]: path.name for path in PAGE.parent.glob("[0-9][0-9]_*.ipynb")}
Triple = tuple[str, str, str]  # ours, diffusers', CompVis'


LAYERS = {
    nn.Conv2d: "a convolution", nn.Linear: "a linear layer", nn.Embedding: "an embedding", nn.GroupNorm: "GroupNorm",
    nn.LayerNorm: "LayerNorm",
}  # fmt: skip


class Network(NamedTuple):
    """One of the three networks: its tensors (without .weight and .bias) in three languages."""

    title: str
    intro: str
    triples: list[Triple]
    layers: dict[str, str]  # our name -> what it is
    repeated: dict[str, type]  # our path of a part that occurs again and again -> its class
    chapter: str
    inside: dict[type, tuple[str, str]]  # such a part -> what it is called here, and its chapter


def network(
    title: str,
    model: nn.Module,
    theirs: Callable[[str], str],
    ldm: Callable[[str], str],
    intro: str,
    chapter: str,
    inside: dict[type, tuple[str, str]],
) -> Network:
    layers = {path: LAYERS[type(part)] for path, part in model.named_modules() if type(part) in LAYERS}
    assert {name.rpartition(".")[0] for name in model.state_dict()} == set(layers), "a tensor outside the known layers"
    triples = [(name, theirs(name + ".")[:-1], ldm(name + ".")[:-1]) for name in layers]
    repeated = {path + ".": type(part) for path, part in model.named_modules() if isinstance(part, tuple(inside))}
    return Network(title, textwrap.fill(intro, 120, break_on_hyphens=False), triples, layers, repeated, chapter, inside)


def networks() -> list[Network]:
    unet, vae, text = UNetConfig(), VAEConfig(), CLIPTextConfig()
    return [
        network(
            "The U-Net",
            empty(UNet, unet),
            lambda name: rename(name, rules(unet)),
            lambda name: rename(name, rules(unet, ldm=True)),
            "In diffusers' layout the file is `unet/diffusion_pytorch_model.safetensors`. In a single file every "
            f"CompVis name has `{PREFIXES['unet'][0]}` in front. Our `down` and `up` are flat lists, diffusers cuts "
            "them into levels $i$, and CompVis counts `conv_in` as number 0 and has upsamplers inside other blocks.",
            "07",
            {ResBlock: ("a ResBlock", "05"), SpatialTransformer: ("a spatial transformer", "07")},
        ),
        network(
            "The VAE",
            empty(VAE, vae),
            lambda name: rename(name, rules(vae)),
            lambda name: rename(name, rules(vae, ldm=True)),
            "In diffusers' layout the file is `vae/diffusion_pytorch_model.safetensors`. In a single file every "
            f"CompVis name has `{PREFIXES['vae'][0]}` in front. CompVis numbers the levels of its decoder from the "
            "picture to the latents, so its last one runs first; and its attention is written with 1x1 convolutions, "
            "whose weights have the shape (C, C, 1, 1) where ours have (C, C).",
            "05",
            {ResBlock: ("a ResBlock", "05"), AttentionBlock: ("attention", "05")},
        ),
        network(
            "The text encoder",
            empty(CLIPTextEncoder, text),
            lambda name: rename(name, CLIP_RULES),
            lambda name: rename(name, CLIP_RULES),
            "The names are those of `transformers`, and CompVis' code used the same class. In "
            "`text_encoder/model.safetensors` every name has `text_model.` in front, in a single file "
            f"`{PREFIXES['text_encoder'][0]}`.",
            "03",
            {CLIPLayer: ("a layer", "03")},
        ),
    ]


def common_prefix(names: list[str]) -> str:
    """The longest prefix that ends in a dot."""
    return re.sub(r"[^.]*$", "", os.path.commonprefix(names))


def insides(net: Network) -> tuple[list[tuple[Triple, type | None]], dict[type, dict[str, tuple[str, str]]]]:
    """Cut every name into a place and what is inside it; the inside of a class has to be the same at all places."""
    places: list[tuple[Triple, type | None]] = []
    inner: dict[type, dict[str, tuple[str, str]]] = {}
    for triple in net.triples:
        path = next((path for path in net.repeated if triple[0].startswith(path)), None)
        if path is None:
            places.append((triple, None))
            continue
        kind, members = net.repeated[path], [t for t in net.triples if t[0].startswith(path)]
        place = (path, common_prefix([t[1] for t in members]), common_prefix([t[2] for t in members]))
        if (place, kind) not in places:
            places.append((place, kind))
        table = inner.setdefault(kind, {})
        for ours, theirs, ldm in members:
            found = (theirs.removeprefix(place[1]), ldm.removeprefix(place[2]))
            assert table.setdefault(ours.removeprefix(path), found) == found, f"{ours} differs from its siblings"
    return places, inner


NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Pattern(NamedTuple):
    """Three names with expressions in i and j, such as down.{3i+j}.resnet., and the values of i and j."""

    names: Triple
    i: range
    j: range
    kind: type | None
    example: str  # our name of the first place


def line(points: list[tuple[int, int, int]]) -> tuple[int, int, int] | None:
    """(i, j, value) of some places -> the simplest (a, b, c) with value = a i + b j + c at all of them, or None."""
    i0, j0, v0 = points[0]
    for a, b in sorted(product(range(-1, 6), range(2)), key=lambda ab: abs(ab[0]) + abs(ab[1])):
        if all(a * (i - i0) + b * (j - j0) == v - v0 for i, j, v in points):
            return a, b, v0 - a * i0 - b * j0
    return None


def expression(a: int, b: int, c: int) -> str:
    """(3, 1, 2) -> {3i+j+2}; a constant stays a number."""
    if not a and not b:
        return str(c)
    terms = [f"{'-' if n < 0 else ''}{abs(n) if abs(n) > 1 else ''}{letter}" for n, letter in ((a, "i"), (b, "j")) if n]
    if c > 0 and terms[0].startswith("-"):  # 3-i reads better than -i+3
        terms, c = [str(c), *terms], 0
    text = "+".join(terms).replace("+-", "-")
    return "{" + text + (f"{c:+d}" if c else "") + "}"


def patterns_of(group: list[Triple], kind: type | None) -> list[Pattern]:
    """Places with equal words and other numbers -> as few patterns as can express them."""
    numbers = [[tuple(map(int, NUMBER.findall(name))) for name in triple] for triple in group]
    theirs = list(zip(*(n[1] for n in numbers), strict=True))
    varying = [column for column in theirs if len(set(column)) > 1]
    assert len(varying) <= 2, group
    i, j = (varying + [(0,) * len(group)] * 2)[:2]
    names = []
    for language in range(3):
        columns, pieces = zip(*(n[language] for n in numbers), strict=True), []
        for column in columns:
            fit = line(list(zip(i, j, column, strict=True)))
            if fit is None:  # no formula: take the places with different numbers here apart
                return [
                    pattern
                    for value in dict.fromkeys(column)
                    for pattern in patterns_of([t for t, v in zip(group, column, strict=True) if v == value], kind)
                ]
            pieces.append(expression(*fit))
        words = iter(pieces)
        names.append(NUMBER.sub(lambda _, words=words: next(words), group[0][language]))
    spans = [range(min(column), max(column) + 1) for column in (i, j)]
    assert set(zip(i, j, strict=True)) == set(product(*spans)), group
    return [Pattern((names[0], names[1], names[2]), *spans, kind, group[0][0])]


def patterns(net: Network) -> list[Pattern]:
    groups: dict[tuple, list[Triple]] = {}
    for triple, kind in insides(net)[0]:
        groups.setdefault((kind, *(NUMBER.sub("#", name) for name in triple)), []).append(triple)
    return [pattern for (kind, *_), group in groups.items() for pattern in patterns_of(group, kind)]


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    yield from ("| " + " | ".join(row) + " |" for row in rows)


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def link(chapter: str) -> str:
    return f"[{chapter}]({LINKS[chapter]})"


def span(pattern: Pattern) -> str:
    """The values of i and j, where they occur."""
    parts = []
    for letter, values in (("i", pattern.i), ("j", pattern.j)):
        if any(re.search(r"\{[^}]*" + letter, name) for name in pattern.names):
            last = f" to {values[-1]}" if len(values) > 1 else ""
            parts.append(f"{letter} = {values[0]}{last}")
    return "".join(f"; {part}" for part in parts)


def chapter_of(name: str, net: Network) -> str:
    if name.startswith("time_embedding"):
        return "06"
    return "05" if re.match(r"(down|up)\.", name) else net.chapter  # changes of size come from chapter 05


def of_network(net: Network) -> Iterator[str]:
    yield f"## {net.title}\n\n{net.intro}\n"
    rows = []
    for pattern in patterns(net):
        name = pattern.example
        what, chapter = net.inside.get(pattern.kind) or (net.layers[name], chapter_of(name, net))
        ours, theirs, ldm = map(code, pattern.names)
        rows.append([f"{ours}<br>{what}{span(pattern)}", theirs, ldm, link(chapter)])
    yield from table(["ours", "diffusers", "CompVis", "chapter"], rows)
    for kind, inner in insides(net)[1].items():
        what, chapter = net.inside[kind]
        places = [path for path, cls in net.repeated.items() if cls is kind]
        yield f"\n### Inside {what} of {net.title[0].lower() + net.title[1:]}\n"
        rows = []
        for ours, (theirs, ldm) in inner.items():
            there = [place + ours for place in places if place + ours in net.layers]
            note = "" if len(there) == len(places) else ", where the width changes"
            part = "02" if re.search(r"attn|to_", ours) else "06" if "time" in ours else chapter
            rows.append([f"{code(ours)}<br>{net.layers[there[0]]}{note}", code(theirs), code(ldm), link(part)])
        yield from table(["ours", "diffusers", "CompVis", "chapter"], rows)
    yield ""


# --- words: ours, diffusers' (or transformers'), CompVis', in papers, chapter. Ours are checked against sdlearn, theirs
# against diffusers and transformers (tests/test_pages.py).
CLASSES = r"""
tokenizer.Tokenizer | transformers.CLIPTokenizer | `FrozenCLIPEmbedder.tokenizer` | | 01
attention.Attention | diffusers.models.attention_processor.Attention | `CrossAttention` | $\mathrm{Attention}$ | 02
clip.CLIPTextEncoder | transformers.CLIPTextModel | `FrozenCLIPEmbedder.transformer` | $\tau_\theta$ | 03
clip.CLIPTextEncoder.forward(skip) | diffusers.StableDiffusionPipeline.__call__(clip_skip) | |  | 03
clip.CLIP | transformers.CLIPModel | |  | 03
clip.contrastive_loss | transformers.models.clip.modeling_clip.image_text_contrastive_loss | |  | 03
blocks.ResBlock | diffusers.models.resnet.ResnetBlock2D | `ResBlock`, in the VAE `ResnetBlock` | | 05
blocks.AttentionBlock | diffusers.models.attention_processor.Attention | `AttnBlock` | | 05
blocks.Downsample | diffusers.models.downsampling.Downsample2D | `Downsample` | | 05
blocks.Upsample | diffusers.models.upsampling.Upsample2D | `Upsample` | | 05
vae.VAE | diffusers.AutoencoderKL | `AutoencoderKL` | $\mathcal E$, $\mathcal D$ | 05
vae.DiagonalGaussian | diffusers.models.autoencoders.vae.DiagonalGaussianDistribution | the same | $q(z \mid x)$ | 05
timestep.timestep_embedding | diffusers.models.embeddings.get_timestep_embedding | `timestep_embedding` | | 06
timestep.TimeEmbedding | diffusers.models.embeddings.TimestepEmbedding | `UNetModel.time_embed` | | 06
unet.UNet | diffusers.UNet2DConditionModel | `UNetModel` | $\varepsilon_\theta$ | 07
unet.SpatialTransformer | diffusers.models.transformers.transformer_2d.Transformer2DModel | `SpatialTransformer` | | 07
unet.TransformerBlock | diffusers.models.attention.BasicTransformerBlock | `BasicTransformerBlock` | | 07
unet.GEGLU | diffusers.models.attention.FeedForward | `FeedForward` | GEGLU | 07
unet.Stage | | `TimestepEmbedSequential` | | 07
schedule.Schedule | diffusers.DDPMScheduler.config | `DDPM.register_schedule` | $\beta_t$, $\bar\alpha_t$ | 08
schedule.add_noise | diffusers.DDPMScheduler.add_noise | `DDPM.q_sample` | $q(x_t \mid x_0)$ | 08
prediction.Prediction.split | | `DDPM.predict_start_from_noise` | $\hat x_0$ | 08
samplers.Leg.of | | `DDPM.q_posterior` | $q(x_{t-1} \mid x_t, x_0)$ | 08
samplers.go | diffusers.DDIMScheduler.step | `DDIMSampler.p_sample_ddim` | $p_\theta(x_{t-1} \mid x_t)$ | 08
samplers.sample | | `DDPM.p_sample_loop` | | 08
samplers.keep | diffusers.StableDiffusionImg2ImgPipeline.get_timesteps | `t_enc` | $t_0$ | 08
samplers.SAMPLERS | diffusers.schedulers.KarrasDiffusionSchedulers | | | 13
inpaint.Inpaint | diffusers.StableDiffusionInpaintPipeline.prepare_mask_latents | `scripts/inpaint_st.py` | $m$ | 14
inpaint.rail | diffusers.StableDiffusionInpaintPipeline.__call__ | | | 14
inpaint.stairs | diffusers.RePaintScheduler.set_timesteps | | jumps | 14
inpaint.seen_through | | `LatentInpaintDiffusion` | | 14
pipeline.StableDiffusion.inpaint | diffusers.StableDiffusionInpaintPipeline | `scripts/inpaint_st.py` | | 14
samplers.heun | diffusers.HeunDiscreteScheduler.step | | | 13
samplers.dpm2 | diffusers.KDPM2DiscreteScheduler.step | | DPM-Solver-2 | 13
samplers.dpmpp_2s | diffusers.DPMSolverSinglestepScheduler.step | | DPM-Solver++(2S) | 13
samplers.dpmpp_2m | diffusers.DPMSolverMultistepScheduler.step | | DPM-Solver++(2M) | 13
samplers.deis | diffusers.DEISMultistepScheduler.step | | $t$AB-DEIS | 13
samplers.plms | diffusers.PNDMScheduler.step | `PLMSSampler.p_sample_plms` | S-PNDM | 13
samplers.unipc | diffusers.UniPCMultistepScheduler.multistep_uni_c_bh_update | | UniC | 13
training.Average | diffusers.training_utils.EMAModel | `LitEma` | | 09
tiny.tasks.DenoiseTask | | `DDPM.p_losses` | $L_{\text{simple}}$ | 09
guidance.guide | | `DDIMSampler.p_sample_ddim` | $\tilde\varepsilon$ | 10
guidance.rescale | diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion.rescale_noise_cfg | | $\phi$ | 10
checkpoint.load.load | diffusers.StableDiffusionPipeline.from_pretrained | `load_model_from_config` | | 11
checkpoint.load.save | diffusers.StableDiffusionPipeline.save_pretrained | | | 11
controlnet.ControlNet | diffusers.ControlNetModel | `ControlNet` | | 16
controlnet.ControlNet.of | diffusers.ControlNetModel.from_unet | | | 16
controlnet.HintPyramid | diffusers.models.controlnets.controlnet.ControlNetConditioningEmbedding | | | 16
controlnet.zero | diffusers.models.controlnets.controlnet.zero_module | `zero_module` | $\mathcal Z$ | 16
controlnet.Control | diffusers.StableDiffusionControlNetPipeline.__call__(control_guidance_start) | | | 16
lcm.guidance_embedding | diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding | | $w$ | 18
samplers.lcm | diffusers.LCMScheduler.step | | $f_\theta$ | 18
samplers.boundary | diffusers.LCMScheduler.get_scalings_for_boundary_condition_discrete | | $c_\text{out}$ | 18
samplers.lcm_levels | diffusers.LCMScheduler.set_timesteps | | | 18
pipeline.StableDiffusion | diffusers.StableDiffusionPipeline | `LatentDiffusion` | | 12
pipeline.StableDiffusion.img2img | diffusers.StableDiffusionImg2ImgPipeline | `scripts/img2img.py` | | 12
inversion.add_embedding | diffusers.StableDiffusionPipeline.load_textual_inversion | | $v^*$ | 15
tokenizer.Tokenizer.parts | diffusers.StableDiffusionPipeline.maybe_convert_prompt | | | 15
pipeline.StableDiffusion.encode_xl | diffusers.StableDiffusionXLPipeline.encode_prompt | | | 17
unet.AddedEmbedding | diffusers.models.embeddings.TimestepEmbedding | `UNetModel.label_emb` | | 17
sdxl.MicroConditioning.original | diffusers.StableDiffusionXLPipeline.__call__(original_size) | | $c_{size}$ | 17
sdxl.MicroConditioning.crop | diffusers.StableDiffusionXLPipeline.__call__(crops_coords_top_left) | | $c_{crop}$ | 17
sdxl.PartOfTheWay.end | diffusers.StableDiffusionXLPipeline.__call__(denoising_end) | | | 17
sdxl.PartOfTheWay.begin | diffusers.StableDiffusionXLImg2ImgPipeline.__call__(denoising_start) | | | 17
"""
CALL = "diffusers.StableDiffusionPipeline.__call__"
IMAGE = "diffusers.StableDiffusionImg2ImgPipeline.__call__"
ARGUMENTS = rf"""
prompt | {CALL}(prompt) | `--prompt` | $y$, $c$ | 00
negative_prompt | {CALL}(negative_prompt) | `unconditional_conditioning` | | 10
steps | {CALL}(num_inference_steps) | `--ddim_steps` | $S$ | 08
cfg_scale | {CALL}(guidance_scale) | `--scale` | $s = 1 + w$ | 10
sampler | diffusers.StableDiffusionPipeline(scheduler) | `DDIMSampler` | | 08
spacing | | `ddim_discretize` | | 13
eta | {CALL}(eta) | `--ddim_eta` | $\eta$ | 08
seed | {CALL}(generator) | `--seed` | | 12
width | {CALL}(width) | `--W` | | 12
height | {CALL}(height) | `--H` | | 12
n | {CALL}(num_images_per_prompt) | `--n_samples` | | 12
latents | {CALL}(latents) | `x_T` | $x_T$ | 12
rescale | {CALL}(guidance_rescale) | | $\phi$ | 10
clip_skip | {CALL}(clip_skip) | |  | 03
guided_times | | |  | 19
two_passes | | |  | 19
image | {IMAGE}(image) | `--init-img` | | 12
strength | {IMAGE}(strength) | `--strength` | $t_0$ | 08
control | diffusers.StableDiffusionControlNetPipeline.__call__(image) | `control` | $c_f$ | 16
extras | | |  | 12
"""
SIZES = r"""
unet.UNetConfig.channels | block_out_channels | `model_channels`, `channel_mult` | | 07
unet.UNetConfig.attention | down_block_types | `attention_resolutions` | | 07
unet.UNetConfig.heads | attention_head_dim | `num_heads` | $h$ | 07
unet.UNetConfig.blocks | layers_per_block | `num_res_blocks` | | 07
unet.UNetConfig.context_width | cross_attention_dim | `context_dim` | $d_\tau$ | 07
unet.UNetConfig.in_channels | in_channels | `in_channels` | | 07
unet.UNetConfig.groups | norm_num_groups | |  | 07
unet.UNetConfig.guidance_width | time_cond_proj_dim | | | 18
vae.VAEConfig.channels | block_out_channels | `ch`, `ch_mult` | | 05
vae.VAEConfig.blocks | layers_per_block | `num_res_blocks` | | 05
vae.VAEConfig.latent_channels | latent_channels | `z_channels` | $c$ | 05
vae.VAEConfig.scale | scaling_factor | `scale_factor` | $1/\hat\sigma$ | 05
clip.CLIPTextConfig.vocab | vocab_size | |  | 03
clip.CLIPTextConfig.positions | max_position_embeddings | `max_length` | | 03
clip.CLIPTextConfig.width | hidden_size | |  | 03
clip.CLIPTextConfig.layers | num_hidden_layers | |  | 03
clip.CLIPTextConfig.heads | num_attention_heads | |  | 03
schedule.Schedule.steps | num_train_timesteps | `timesteps` | $T$ | 08
schedule.Schedule.betas | trained_betas | `given_betas` | $\beta_t$ | 08
schedule.scaled_linear(start) | beta_start | `linear_start` | $\beta_1$ | 08
schedule.scaled_linear(end) | beta_end | `linear_end` | $\beta_T$ | 08
prediction.Prediction.name | prediction_type | `parameterization` | | 08
schedule.Schedule.spacing | timestep_spacing | `ddim_discretize` | | 08
schedule.Schedule.offset | steps_offset | |  | 08
schedule.Schedule.ends_clean | set_alpha_to_one | |  | 08
schedule.Schedule.noise_offset | | |  | 09
unet.UNetConfig.depth | transformer_layers_per_block | `transformer_depth` | | 17
unet.UNetConfig.linear | use_linear_projection | `use_linear_in_transformer` | | 17
unet.UNetConfig.added | projection_class_embeddings_input_dim | `adm_in_channels` | | 17
vae.VAEConfig.upcast | force_upcast | | | 17
clip.CLIPTextConfig.exact_gelu | hidden_act | | | 17
clip.CLIPTextConfig.projection | projection_dim | | | 17
"""


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("|")] for row in text.strip().split("\n")]


def short(path: str) -> list[str]:
    """A dotted path, perhaps with arguments -> what the page shows: the arguments of a call, or class and method."""
    owner, _, arguments = path.removesuffix(")").partition("(")
    words = owner.split(".")
    if owner.endswith(("__call__", "Pipeline")) and arguments:
        return arguments.split(", ")
    name = ".".join([word for word in words[:-1] if word[0].isupper()] + words[-1:])
    name = f"transformers.{name}" if words[0] == "transformers" and len(words) == 2 else name
    return [f"{name}({arguments})" if arguments else name] if name else []


def words_table(text: str) -> Iterator[str]:
    rows = []
    for ours, theirs, ldm, symbol, chapter in rows_of(text):
        cells = [", ".join(map(code, short(cell))) for cell in (ours, theirs)]
        rows.append([*cells, ldm, symbol, link(chapter)])
    yield from table(["ours", "diffusers", "CompVis", "in papers", "chapter"], rows)


INTRO = """# Names elsewhere

The same thing has one name here, another in [diffusers](https://github.com/huggingface/diffusers), and a third in
[CompVis' code](https://github.com/CompVis/stable-diffusion), the original code of Stable Diffusion. This page puts the
three side by side: first for every tensor of a checkpoint, then for classes, arguments and sizes. `tools/rosetta.py`
makes it from the maps with which `sdlearn` loads files ([chapter 11](11_weights.ipynb)), and a test compares the two,
tensor by tensor.

## How to read the patterns

Braces hold a number: with $i = 1$ and $j = 0$, `down.{3i+j}.resnet.` is `down.3.resnet.`. A pattern that ends in a dot
is continued by a name from the table "Inside ...". Every name ends in `.weight` or `.bias`, which is left out here. The
numbers are those of SD 1.5, with two ResBlocks a level; `sdlearn.checkpoint.dialects` has the rules for any size.
"""
WORDS = """## Classes and functions

An empty cell means that there is no single counterpart. CompVis' classes are in `ldm/`.
"""
CALLS = """## Arguments of a call

Ours are the fields of a `Request`, which `StableDiffusion.txt2img` and `img2img` take as keywords. Most of them are
also options of the command `sdlearn`, written with hyphens, as in `--cfg-scale`.
"""
CONFIGS = """## Sizes and settings

Ours are fields of the frozen dataclasses `UNetConfig`, `VAEConfig`, `CLIPTextConfig` and `Schedule`; diffusers' are
keys of the JSON beside the weights; CompVis' are keys of `v1-inference.yaml` or arguments of its classes.
"""
TRAPS = """Four of these names are false friends:

- `attention_head_dim` is, for SD 1, the *number* of heads ([chapter 11](11_weights.ipynb)).
- What CompVis calls "linear" is "scaled_linear" in diffusers and here; our "linear" is its "sqrt_linear"
  ([chapter 08](08_ddpm.ipynb)).
- `clip_skip=1` here and in diffusers leaves out one layer; many other tools call that "clip skip 2"
  ([chapter 03](03_clip.ipynb)).
- In the paper on guidance, 0 means no guidance: its $w$ is our `cfg_scale` - 1 ([chapter 10](10_guidance.ipynb)).
"""


def page() -> str:
    parts = [INTRO]
    for net in networks():
        parts += of_network(net)
    for text, rows in ((WORDS, CLASSES), (CALLS, ARGUMENTS), (CONFIGS, SIZES)):
        parts += [text, *words_table(rows), ""]
    return "\n".join([*parts, TRAPS])


def main() -> int:
    text = page()
    stale = not PAGE.exists() or PAGE.read_text("utf-8") != text
    if "--check" in sys.argv:
        if stale:
            print("stale; run tools/rosetta.py: book/rosetta.md")
        return int(stale)
    PAGE.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
