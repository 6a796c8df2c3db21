"""scenes -> losses: what VAE, CLIP and U-Net learn from. Chapter 09.
Exported from book/09_training.ipynb by `make export`; edit it there.
"""

import math
import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from sdlearn.attention import Attention
from sdlearn.clip import CLIP, CLIPTextEncoder, contrastive_loss
from sdlearn.disk import write_files
from sdlearn.guidance import Guided
from sdlearn.prediction import EPSILON, Prediction
from sdlearn.samplers import SAMPLERS, Denoiser, sample
from sdlearn.schedule import Schedule, add_noise
from sdlearn.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    OBJECTS,
    SIZE,
    Scene,
    Thing,
    random_scene,
    random_thing,
    split_of,
)
from sdlearn.tokenizer import Tokenizer
from sdlearn.training import Task
from sdlearn.unet import UNet
from sdlearn.vae import VAE, DiagonalGaussian


def to_tensor(picture: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) in [-1, 1]."""
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1


def normal(rngs: Sequence[random.Random], *shape: int) -> Tensor:
    """Standard normal noise, one sample for each generator: (B, *shape)."""
    return torch.stack(
        [
            torch.randn(
                shape, generator=torch.Generator().manual_seed(r.getrandbits(63))
            )
            for r in rngs
        ]
    )


def numbered_scene(number: int) -> Scene:
    """The training scene of this number, the same in every run."""
    return random_scene(random.Random(number))


@torch.no_grad()
def encode_scenes(vae: VAE, numbers: range, batch: int = 32) -> Tensor:
    """The latents of numbered scenes, unscaled: means (N, 4, 16, 16), float16."""
    device = next(vae.parameters()).device
    chunks = [numbers[i : i + batch] for i in range(0, len(numbers), batch)]
    pictures = (
        torch.stack([to_tensor(numbered_scene(n).render()) for n in chunk])
        for chunk in chunks
    )
    return torch.cat(
        [vae.unscaled(x.to(device)).mean.float().cpu() for x in pictures]
    ).half()


class PlainTask(Task):
    """Tell the noise in noisy latents, given the words; one caption in ten is empty.

    Ho et al. 2020, algorithm 1. Only the U-Net learns; the text encoder is frozen.
    """

    def __init__(
        self,
        unet: UNet,
        text_encoder: CLIPTextEncoder,
        tokenizer: Tokenizer,
        latents: Tensor,
        schedule: Schedule,
        drop: float = 0.1,
        prediction: Prediction = EPSILON,
    ):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder.requires_grad_(False)
        self.tokenizer, self.latents, self.schedule = tokenizer, latents, schedule
        self.drop, self.prediction = drop, prediction

    def times(self, rngs: Sequence[random.Random]) -> Tensor:
        """A time for each example: (B,), all with the same chance."""
        return torch.tensor([rng.randrange(self.schedule.steps) for rng in rngs])

    def fresh_noise(self, rngs: Sequence[random.Random]) -> Tensor:
        """Noise for each example, in the shape of its latents."""
        return normal(rngs, *self.latents.shape[1:])

    def examples(self, rngs: Sequence[random.Random]) -> dict[str, Tensor]:
        numbers = [rng.randrange(len(self.latents)) for rng in rngs]
        told = [
            (rng.random() < self.drop, numbered_scene(n).caption(rng))
            for n, rng in zip(numbers, rngs, strict=True)
        ]
        texts = ["" if dropped else caption for dropped, caption in told]
        return {
            "latents": self.latents[numbers].float(),
            "tokens": self.tokenizer(texts),
            "t": self.times(rngs),
            "noise": self.fresh_noise(rngs),
            "number": torch.tensor(numbers),
        }

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x0, noise, t = batch["latents"], batch["noise"], batch["t"]
        level = self.schedule.at(t)
        xt = add_noise(x0, noise, level).contiguous(memory_format=torch.channels_last)
        answer = self.unet(xt, t, self.text_encoder(batch["tokens"])).float()
        return self.losses(answer, self.prediction.target(x0, noise, level), t)

    def losses(self, answer: Tensor, target: Tensor, t: Tensor) -> dict[str, Tensor]:
        return {"loss": (answer - target).square().mean()}


def latent_bank(vae: VAE, count: int, path: Path, chunk: int = 2048) -> Tensor:
    """encode_scenes of the first `count` scenes, kept in a file.

    An interrupted or a larger run goes on with it; what another VAE made is dropped.
    """
    bank = torch.load(path, weights_only=True) if path.exists() else torch.empty(0)
    first = encode_scenes(vae, range(1))
    if bank[:1].shape != first.shape or (bank[:1] - first).abs().max() > 0.05:
        bank = bank[:0]
    while len(bank) < count:
        more = encode_scenes(vae, range(len(bank), min(len(bank) + chunk, count)))
        bank = torch.cat([bank.half(), more]) if len(bank) else more
        write_files({path: partial(torch.save, bank)})
    return bank[:count]


PREVIEW = (
    "a red apple on a blue background",
    "a cat on a yellow background",
    "a purple guitar to the left of a tiger on a white background",
    "a yellow star above a green bus on a pink background",
)


def loss_weights(
    schedule: Schedule,
    prediction: Prediction = EPSILON,
    most: float = 10.0,
    floor: float = 0.05,
) -> Tensor:
    """How much the squared error of the answer counts at each t: (steps,), mean 1.

    Plain eps-loss hardly counts a wrong x0 where noise is strong, and that is where the
    words decide what goes where.
    The weight of eps, (min(snr, most) + 1) / (snr + floor), follows Hang et al. 2023
    (section 3.4) at low noise, and v-prediction at high noise. Another answer's error
    is first turned into that of eps.
    """
    level = schedule.at(torch.arange(schedule.steps))
    snr = torch.as_tensor(level.ratio) ** -2
    one = torch.ones_like(snr)
    in_eps = prediction.split(0 * one, one, level)[1]  # an answer off by one, in eps
    weights = in_eps**2 * (snr.clamp(max=most) + 1) / (snr + floor)
    return (weights / weights.mean()).flatten()


class DenoiseTask(PlainTask):
    """PlainTask with weights and chances by time, offset noise, and previews.

    offset: how much each channel's mean of the noise varies beyond chance. The schedule
    never quite reaches pure noise, so the background shines through at t = 999, and
    would be read there instead of in the words (Lin et al. 2024, section 3.1). Offset
    noise hides it (Guttenberg 2023; SDXL: Podell et al. 2024, section 2.5).
    joint: the text encoder learns, too. vae: draws the previews.
    """

    weights: Tensor

    def __init__(
        self,
        unet: UNet,
        text_encoder: CLIPTextEncoder,
        tokenizer: Tokenizer,
        latents: Tensor,
        schedule: Schedule,
        drop: float = 0.1,
        offset: float = 0.1,
        joint: bool = False,
        vae: VAE | None = None,
        prediction: Prediction = EPSILON,
    ):
        plain = unet, text_encoder, tokenizer, latents, schedule, drop, prediction
        super().__init__(*plain)
        self.text_encoder.requires_grad_(joint)
        self.vae = vae.requires_grad_(False) if vae else None  # only for the preview
        self.offset = offset
        weights = loss_weights(schedule, prediction)
        # how often a time is drawn, 1 on average: half of them where errors count
        self.often = (1 + weights) / 2
        self.chances = list(accumulate(self.often.tolist()))
        self.register_buffer("weights", weights, persistent=False)

    def times(self, rngs: Sequence[random.Random]) -> Tensor:
        """A time for each example: (B,), t as often as `often[t]` says."""
        last = self.chances[-1]
        return torch.tensor([bisect(self.chances, rng.random() * last) for rng in rngs])

    def fresh_noise(self, rngs: Sequence[random.Random]) -> Tensor:
        """Noise whose mean over the map varies too, channel by channel."""
        noise = super().fresh_noise(rngs)
        return noise + self.offset * normal(rngs, self.latents.shape[1], 1, 1)

    def losses(self, answer: Tensor, target: Tensor, t: Tensor) -> dict[str, Tensor]:
        error = (answer - target).square().mean(dim=(1, 2, 3))
        error = error / self.often.to(t.device)[t]  # drawn twice as often, counts half
        return {"loss": (self.weights[t] * error).mean(), "plain": error.mean()}

    @torch.inference_mode()
    def preview(
        self, prompts: Sequence[str] = PREVIEW, steps: int = 25, scale: float = 5.0
    ) -> Tensor:
        """A picture for each prompt, always from the same noise: (B, 3, 128, 128)."""
        if self.vae is None:
            raise ValueError("a preview needs the VAE: give the task one")
        device = self.weights.device
        context, empty = (
            {"context": self.text_encoder(self.tokenizer(text).to(device))}
            for text in (list(prompts), "")
        )
        dice = [random.Random(i) for i in range(len(prompts))]
        noise = normal(dice, *self.latents.shape[1:]).to(device)
        guided = Guided(self.unet, context, empty, scale)
        denoise = Denoiser(guided, self.schedule, self.prediction)
        levels = self.schedule.levels(steps, clean=SAMPLERS["ddim"].clean)
        *_, last = sample(denoise, noise, levels, "ddim")
        return self.vae.decode(last.latents)


class VAETask(Task):
    """Give the picture back after squeezing it through the latents; chapter 05."""

    def __init__(self, vae: VAE, crop: int | None = None, kl: float = 3e-4):
        super().__init__()
        self.vae, self.crop, self.kl = vae, crop, kl

    def examples(self, rngs: Sequence[random.Random]) -> dict[str, Tensor]:
        image = torch.stack([self.crop_of(random_scene(rng), rng) for rng in rngs])
        size = image.shape[-1] // 2 ** (len(self.vae.config.channels) - 1)
        return {
            "image": image,
            "noise": normal(rngs, self.vae.config.latent_channels, size, size),
        }

    def crop_of(self, scene: Scene, rng: random.Random) -> Tensor:
        """The whole picture, or a square of it near one of its things."""
        image = to_tensor(scene.render())
        if self.crop is None:
            return image
        thing, half, room = rng.choice(scene.things), self.crop // 2, SIZE - self.crop
        left, top = (
            min(max(at - half + rng.randint(-28, 28), 0), room)
            for at in (thing.x, thing.y)
        )
        return image[:, top : top + self.crop, left : left + self.crop]

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        latents = self.vae.unscaled(image)
        drawn = self.vae.config.scale * self.drawn(latents, batch["noise"])
        error = self.vae.decode(drawn).float() - image
        # nats for each latent number
        kl = latents.kl().float().mean() / latents.mean[0].numel()
        squared = error.square().mean()
        losses = {
            "absolute": error.abs().mean(),
            "psnr": 10 * (4 / squared).log10(),
            "kl": kl,
        }
        return {"loss": self.difference(error) + self.kl * kl} | losses

    def drawn(self, latents: DiagonalGaussian, noise: Tensor) -> Tensor:
        """A sample of the cloud."""
        return latents.mean + (0.5 * latents.logvar).exp() * noise

    def difference(self, error: Tensor) -> Tensor:
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + 4 * error.square().mean() + 0.5 * edges


def doodle(rng: random.Random) -> np.ndarray:
    """A picture of nothing: shapes in the world's colours, (128, 128, 3) uint8."""
    picture = Image.new(
        "RGB", (4 * SIZE, 4 * SIZE), rng.choice([*BACKGROUNDS.values()])
    )
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.randint(1, 4)):
        x, y, radius = (
            4 * rng.uniform(*between) for between in ((20, 108), (20, 108), (10, 50))
        )
        angles = sorted(rng.uniform(0, 2 * math.pi) for _ in range(rng.randint(3, 10)))
        radii = [radius * rng.uniform(0.5, 1) for _ in angles]
        corners = [
            (x + r * math.cos(a), y + r * math.sin(a))
            for a, r in zip(angles, radii, strict=True)
        ]
        light, dark = rng.choice([*COLOURS.values()])
        pen.polygon(corners, fill=light)
        pen.polygon([(x, y), *corners[: rng.randint(2, 3)]], fill=dark)
        width = rng.randint(5, 12)
        pen.line([*corners, *corners[:2]], fill="black", width=width, joint="curve")
        for corner in rng.sample(corners, rng.randint(0, 3)):
            pen.line([(x, y), corner], fill="black", width=width)
    return np.array(picture.resize((SIZE, SIZE), Image.Resampling.BOX))


class DecoderTask(VAETask):
    """VAETask for the decoder alone: the encoder stays, and latents keep their meaning.

    noise: how far off latents are at most, in standard deviations. doodles: the share
    of pictures that show nothing.
    """

    def __init__(self, vae: VAE, noise: float = 0.2, doodles: float = 0.25):
        super().__init__(vae)
        self.noise, self.doodles = noise, doodles
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)

    def examples(self, rngs: Sequence[random.Random]) -> dict[str, Tensor]:
        batch = super().examples(rngs)
        strength = torch.tensor([rng.uniform(0, self.noise) for rng in rngs])
        return batch | {"noise": strength[:, None, None, None] * batch["noise"]}

    def crop_of(self, scene: Scene, rng: random.Random) -> Tensor:
        return to_tensor(doodle(rng) if rng.random() < self.doodles else scene.render())

    def drawn(self, latents: DiagonalGaussian, noise: Tensor) -> Tensor:
        return latents.mean + latents.mean.std() * noise

    def difference(self, error: Tensor) -> Tensor:
        """Colours in the large count more: the errors' means over 8x8 pixels."""
        return super().difference(error) + F.avg_pool2d(error, 8).abs().mean()


def scene_tokenizer() -> Tokenizer:
    """The tiny model's vocabulary: every word of the world is one token.

    It is learned from 5,000 captions (chapter 01).
    """
    rng = random.Random(0)
    return Tokenizer.train(random_scene(rng).caption(rng) for _ in range(5000))


def family(rng: random.Random) -> list[Scene]:
    """A scene and three that differ in one thing each: hard negatives.

    Yuksekgonul et al. 2023, section 4.
    """
    scene = random_scene(rng)
    place = rng.randrange(len(scene.things))
    thing = scene.things[place]

    def changed(new: Thing) -> Scene:
        things = (new if i == place else old for i, old in enumerate(scene.things))
        return replace(scene, things=tuple(things))

    other = random_thing(rng)
    another = [name for name in BACKGROUNDS if name != scene.background]
    colours = [name for name in COLOURS if name != thing.colour]
    scenes = [
        scene,
        scene.mirrored()
        if len(scene.things) == 2
        else replace(scene, background=rng.choice(another)),
        changed(replace(thing, name=other.name, colour=other.colour)),
        changed(replace(thing, colour=rng.choice(colours)))
        if thing.colour
        else replace(scene, background=rng.choice(another)),
    ]
    if len({x.name for x in scenes[2].things}) == len(scene.things) and {
        split_of(x) for x in scenes
    } == {"train"}:
        return scenes
    return family(rng)


class CLIPTask(Task):
    """Find the sentence of every picture, and the other way round; chapter 03."""

    def __init__(self, clip: CLIP, tokenizer: Tokenizer):
        super().__init__()
        self.clip, self.tokenizer = clip, tokenizer

    def examples(self, rngs: Sequence[random.Random]) -> dict[str, Tensor]:
        scenes, captions = [], []
        for rng in rngs[::4]:
            exact = rng.random() < 0.75
            for scene in family(rng):
                scenes.append(scene)
                captions.append(
                    (scene.turned() if rng.random() < 0.5 else scene).sentence()
                    if exact
                    else scene.caption(rng)
                )
        tokens = self.tokenizer(captions)
        # what follows cannot change the end token
        longest = int((tokens == self.tokenizer.eos).int().argmax(dim=1).max()) + 1
        return {
            "tokens": tokens[:, :longest],
            "image": torch.stack([to_tensor(scene.render()) for scene in scenes]),
        }

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.clip(batch["tokens"], batch["image"]).float()
        right = torch.arange(len(logits), device=logits.device)
        return {
            "loss": contrastive_loss(logits),
            "images_found": (logits.argmax(1) == right).float().mean(),
            "texts_found": (logits.argmax(0) == right).float().mean(),
        }


GRID = 4  # a scene's layout: what lies in each of 4x4 places


def layout(scene: Scene) -> Tensor:
    """(2, 16): for each place the numbers of its object and its colour, 0 for none."""
    labels = torch.zeros(2, GRID, GRID, dtype=torch.long)
    centres = (torch.arange(GRID) + 0.5) * SIZE / GRID
    for thing in scene.things:
        left, top, right, bottom = thing.box
        here = (
            ((top <= centres) & (centres < bottom))[:, None]
            & (left <= centres)
            & (centres < right)
        )
        labels[0, here] = 1 + OBJECTS.index(thing.name)
        labels[1, here] = 1 + [*COLOURS].index(thing.colour) if thing.colour else 0
    return labels.flatten(1)


class Places(nn.Module):
    """context (B, S, D) -> logits of objects, colours and the background.

    Those of the places are (B, 16, classes).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.places = nn.Parameter(torch.randn(GRID * GRID, width))
        self.attention, self.norm = Attention(width, heads, width), nn.LayerNorm(width)
        self.objects = nn.Linear(width, 1 + len(OBJECTS))
        self.colours = nn.Linear(width, 1 + len(COLOURS))
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.places.expand(len(context), -1, -1)
        x = self.norm(x + self.attention(x, context))
        return self.objects(x), self.colours(x), self.background(x.mean(dim=1))


def in_any_colour(scene: Scene, rng: random.Random) -> Scene:
    """The scene, half of its things in any colour; none of the held-out combinations.

    No picture shows a blue dog, but words can say it.
    """
    things = tuple(
        replace(thing, colour=rng.choice([*COLOURS])) if rng.random() < 0.5 else thing
        for thing in scene.things
    )
    other = replace(scene, things=things)
    return other if split_of(other) == "train" else scene


class PlacesTask(Task):
    """Tell from the words alone what lies where, in scenes of any colours.

    Sixteen places ask the context, as a U-Net's positions will. seen: the share of the
    first tokens that they may look at in one step. What is known must then be readable
    in several tokens, among them the colour's own, which never saw its object.
    """

    def __init__(
        self, text_encoder: CLIPTextEncoder, tokenizer: Tokenizer, seen: float = 0.6
    ):
        super().__init__()
        self.seen = seen
        self.text_encoder, self.tokenizer = text_encoder.requires_grad_(True), tokenizer
        self.places = Places(text_encoder.config.width, text_encoder.config.heads)

    def examples(self, rngs: Sequence[random.Random]) -> dict[str, Tensor]:
        scenes = [in_any_colour(random_scene(rng), rng) for rng in rngs]
        captions = [scene.caption(rng) for scene, rng in zip(scenes, rngs, strict=True)]
        told = [
            len(s.things) == 2 and " and " not in caption
            for s, caption in zip(scenes, captions, strict=True)
        ]
        mirrored = [
            scene.mirrored() if pair else scene
            for scene, pair in zip(scenes, told, strict=True)
        ]
        dice, longest = rngs[0], 24  # tokens; no caption is longer
        return {
            "seen": torch.tensor(
                [i >= longest or dice.random() < self.seen for i in range(77)]
            ),
            "tokens": self.tokenizer(captions),
            "layout": torch.stack([layout(scene) for scene in scenes]),
            "mirrored": torch.stack([layout(scene) for scene in mirrored]),
            "background": torch.tensor(
                [[*BACKGROUNDS].index(scene.background) for scene in scenes]
            ),
            "told": torch.tensor(told),
        }

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        context = self.text_encoder(batch["tokens"])[:, batch["seen"]]
        objects, colours, background = (x.float() for x in self.places(context))

        def surprise(layout: Tensor) -> tuple[Tensor, Tensor]:
            """The cross-entropy of objects and of colours in each scene, (B,)."""
            pairs = zip((objects, colours), layout.unbind(1), strict=True)
            object_loss, colour_loss = (
                F.cross_entropy(x.mT, labels, reduction="none").mean(1)
                for x, labels in pairs
            )
            return object_loss, colour_loss

        (object_loss, colour_loss), told = surprise(batch["layout"]), batch["told"]
        background_loss = F.cross_entropy(background, batch["background"])
        prefers = (object_loss < surprise(batch["mirrored"])[0])[told]
        loss = object_loss.mean() + colour_loss.mean() + 0.2 * background_loss
        losses = {
            "objects": object_loss.mean(),
            "colours": colour_loss.mean(),
            "background": background_loss,
        }
        return {"loss": loss} | losses | {"sides": prefers.float().mean()}


class HintedTask(DenoiseTask):
    """DenoiseTask with a hint: the middle of the U-Net says what lies where.

    After Yu et al. 2025, section 3, where an early layer of a transformer has to say
    what a trained image encoder sees. The layer that says it is thrown away when
    training ends.
    """

    def __init__(self, unet: UNet, *others: Any, hint: float = 0.15, **more: Any):
        super().__init__(unet, *others, **more)
        self.hint = hint
        width = unet.config.channels[-1]
        answers = nn.Conv2d(width, 2 + len(OBJECTS) + len(COLOURS), 1)
        self.says = nn.Sequential(nn.GroupNorm(unet.config.groups, width), answers)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        seen = []
        hook = self.unet.middle.register_forward_hook(
            lambda *call: seen.append(call[-1])
        )
        try:
            losses = super().forward(batch)
        finally:
            hook.remove()
        # (B, classes, 16)
        said = self.says(F.adaptive_avg_pool2d(seen[0], GRID)).flatten(2).float()
        objects, colours = said.tensor_split([1 + len(OBJECTS)], dim=1)
        truth = torch.stack(
            [layout(numbered_scene(n)) for n in batch["number"].tolist()]
        ).to(said.device)
        answers = zip((objects, colours), truth.unbind(1), strict=True)
        object_loss, colour_loss = (
            F.cross_entropy(said, labels, reduction="none") for said, labels in answers
        )
        surprise = (object_loss + colour_loss).mean(dim=1)  # (B,)
        t = batch["t"]
        # words are needed at strong noise
        hint = (self.weights[t] / self.often.to(t.device)[t] * surprise).mean()
        return losses | {
            "loss": losses["loss"] + self.hint * hint,
            "weighted": losses["loss"],
            "hint": hint,
        }


class PairedTask(DenoiseTask):
    """DenoiseTask with each example twice, with words and without: the error of the
    guided answer counts, too.

    Where noise is weak (t < below) all can be seen and words add nothing, so the two
    answers should be one; guidance by `scale` multiplies whatever else they differ in.
    Above, it is free to exaggerate. guided: how much its error counts.
    """

    def __init__(
        self,
        *others: Any,
        scale: float = 7.5,
        below: int = 500,
        guided: float = 0.1,
        **more: Any,
    ):
        super().__init__(*others, **{"drop": 0.0} | more)
        self.scale, self.below, self.guided = scale, below, guided

    def examples(self, rngs: Sequence[random.Random]) -> dict[str, Tensor]:
        told = super().examples(rngs[::2])
        pairs = {name: torch.cat([x, x]) for name, x in told.items()}
        return pairs | {
            "tokens": torch.cat([told["tokens"], self.tokenizer([""] * len(told["t"]))])
        }

    def losses(self, answer: Tensor, target: Tensor, t: Tensor) -> dict[str, Tensor]:
        losses, (told, untold) = super().losses(answer, target, t), answer.chunk(2)
        target, t = target[: len(told)], t[: len(told)]
        weak = (t < self.below)[:, None, None, None]
        answers = {"told": told, "guided": untold + self.scale * (told - untold)}
        weakly = {
            name: super(PairedTask, self).losses(
                torch.where(weak, y, target), target, t
            )["loss"]
            for name, y in answers.items()
        }
        return (
            losses | weakly | {"loss": losses["loss"] + self.guided * weakly["guided"]}
        )


class GuidedTask(PairedTask, HintedTask):
    """The last steps of the recipe: pairs, and a smaller hint."""

    def __init__(self, *others: Any, **more: Any):
        super().__init__(*others, **{"hint": 0.05} | more)
