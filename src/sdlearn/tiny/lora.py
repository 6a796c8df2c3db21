"""pictures -> a LoRA: a new word or a new style for a finished model. See chapter 15.

`sdlearn train lora` takes your own pictures with captions, or one of two sets of ours:
the unicorn, a word that the tiny model never heard, and ink, a style.
"""

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sdlearn.disk import check_writable
from sdlearn.lora import ATTENTION, LoRA, Pair, save_lora, with_lora
from sdlearn.pictures import to_tensor
from sdlearn.pipeline import StableDiffusion
from sdlearn.schedule import add_noise
from sdlearn.tiny.own import (
    add_picture_arguments,
    asked,
    check_learner,
    mark_of_pictures,
    only_again,
    read_folder,
)
from sdlearn.tiny.recipe import tell, train_task
from sdlearn.tiny.scenes import (
    BACKGROUNDS,
    OBJECTS,
    SIZE,
    Scene,
    Thing,
    paste,
    place,
    random_scene,
    random_thing,
    sprite,
)
from sdlearn.tiny.tasks import DenoiseTask, PairedTask, encode_scenes
from sdlearn.training import Recipe, averaged_weights

RECIPE = Recipe(
    steps=800, batch=8, lr=1e-2, warmup=20, cooldown=450, decay=0.0, ema=0.98
)
LAYERS = {ATTENTION: 4}  # which layers change, and the rank of their pairs
PRIOR = 512  # old scenes that keep what was known
PREVIEW_EVERY = 100  # steps
WORD, STYLE = "unicorn", "ink"  # no object of the scenes is called so
UNSHOWN = ("blue", "purple"), OBJECTS[::2]  # backgrounds and neighbours left out
Pictures = Sequence[tuple[Image.Image, str]]


def unicorn_scene(rng: random.Random, pair: bool, shown: bool | None = True) -> Scene:
    """A unicorn alone, or beside another thing.

    shown: with backgrounds and neighbours that it learns with; False: with others;
    None: with any.
    """
    grounds = [x for x in BACKGROUNDS if shown is None or (x in UNSHOWN[0]) != shown]
    things = [Thing(WORD, None, 0, 0, 0)]
    if pair:
        others = [x for x in OBJECTS if shown is None or (x in UNSHOWN[1]) != shown]
        things.append(random_thing(rng, rng.choice(others)))
        rng.shuffle(things)
    return Scene(place(tuple(things), rng), rng.choice(grounds))


def unicorns(alone: int = 24, pairs: int = 48, captions: int = 1) -> Pictures:
    """What a reader might have drawn: a unicorn, alone and beside other things.

    captions: how often each picture comes, each time in other words. Of a pair, two in
    three name the unicorn first, since that is the harder case: all other words then
    come after its seven tokens.
    """
    rng = random.Random(WORD)
    scenes = [unicorn_scene(rng, i >= alone) for i in range(alone + pairs)]
    return [(x.image(), english(told(x, rng))) for x in captions * scenes]


def told(scene: Scene, rng: random.Random) -> str:
    """A caption; of a pair, two in three name the unicorn first."""
    first = len(scene.things) == 1 or rng.random() < 2 / 3
    caption = english(scene.caption(rng))
    while caption.startswith(f"a {WORD}") != first:
        caption = english(scene.caption(rng))
    return caption


def english(caption: str) -> str:
    """One says "a unicorn", though it begins with a vowel's letter."""
    return caption.replace(f"an {WORD}", f"a {WORD}")


def in_ink(scene: Scene) -> Image.Image:
    """The same scene as a line drawing: its outlines alone, on its coloured paper."""
    picture = np.empty((SIZE, SIZE, 3), np.uint8)
    picture[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        drawing = sprite(thing.name, thing.colour, thing.size).copy()
        light = drawing[..., :3].max(axis=-1).clip(0, 96) / 96  # 0: black
        drawing[..., 3] = (drawing[..., 3] * (1 - light)).round()
        drawing[..., :3] = 0
        left, top = thing.box[:2]
        paste(picture, drawing, left, top)
    return Image.fromarray(picture)


def drawings(count: int = 96) -> Pictures:
    """A style: scenes of the training set in ink, with their own captions."""
    rng = random.Random(STYLE)
    scenes = [random_scene(rng) for _ in range(count)]
    return [(in_ink(scene), scene.caption(rng)) for scene in scenes]


class Lesson(NamedTuple):
    """One of our sets: its pictures, and how a LoRA learns them.

    layers: {pattern: rank}. paired: each example with words and without, as the last
    stage of the tiny model's U-Net learned (chapter 09).
    """

    pictures: Callable[[], Pictures]
    recipe: Recipe = RECIPE
    layers: Mapping[str, int] = LAYERS
    paired: bool = False
    prior: float = 0.2


# A new outline is drawn by convolutions, the more of them the finer the map; attention
# alone only finds its place. And the text encoder has to read on after a word of seven
# tokens, which moves all that follow to positions where it never met them.
UNICORN = {
    r"text_encoder.*_proj": 3,
    r"text_encoder.*fc": 1,
    r"unet\.up_blocks\.0.*attn\d\.to_": 2,
    r"unet\.up_blocks\.0.*conv\d": 1,
    r"unet\.up_blocks\.1.*(attn\d\.to_|ff\.net)": 2,
    r"unet\.up_blocks\.1.*conv\d": 3,
    r"unet\.up_blocks\.2.*conv\d": 4,
}
SETS = {
    WORD: Lesson(
        partial(unicorns, alone=40, pairs=80, captions=2),
        replace(RECIPE, steps=2400, batch=16, lr=4e-3, cooldown=1200),
        UNICORN,
        paired=True,
        prior=0.35,
    ),
    STYLE: Lesson(drawings, replace(RECIPE, steps=600, cooldown=337), prior=0.0),
}


class LoraTask(DenoiseTask):
    """Tell the noise in a few new pictures, with a LoRA's numbers alone.

    Some examples are old scenes, so that what was known is not lost (prior
    preservation; Ruiz et al. 2023, section 3.3). Of them the model has to say what it
    said before: its own old answers are targets with less chance in them than the noise
    (Li & Hoiem 2018, section 3).
    """

    def __init__(
        self,
        sd: StableDiffusion,
        lora: LoRA,
        pictures: Pictures,
        prior: Tensor | None,
        share: float = 0.2,
        **more: Any,
    ):
        height, width = sd.size
        with torch.no_grad():
            tensors = (to_tensor(x, width, height) for x, _ in pictures)
            new = [sd.vae.encode(x.to(sd.device)).mean.cpu() for x in tensors]
        latents = torch.cat(new) if prior is None else prior
        parts = sd.unet, sd.text_encoder, sd.tokenizer, latents, sd.schedule
        super().__init__(*parts, vae=sd.vae, prediction=sd.prediction, **more)
        self.lora: LoRA = lora
        self.networks = {"unet": sd.unet, "text_encoder": sd.text_encoder}
        self.new, self.share = torch.cat(new), share
        self.captions = [caption for _, caption in pictures]
        self.old = prior is not None

    def examples(self, rngs: Sequence[random.Random]) -> dict[str, Tensor]:
        batch = super().examples(rngs)
        batch["old"] = torch.zeros(len(rngs), dtype=torch.bool)
        for i, rng in enumerate(rngs):
            if self.old and rng.random() < self.share:
                batch["old"][i] = True
                continue
            number = rng.randrange(len(self.new))
            batch["latents"][i] = self.new[number]
            text = "" if rng.random() < self.drop else self.captions[number]
            batch["tokens"][i] = self.tokenizer(text)[0]
        return batch

    @torch.no_grad()
    def before(self, xt: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """What the model answered before it had the LoRA."""
        self.lora.detach()
        try:
            return self.unet(xt, t, self.text_encoder(tokens)).float()
        finally:
            self.lora.attach(self.networks)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x0, noise, t, old = (batch[x] for x in ("latents", "noise", "t", "old"))
        level = self.schedule.at(t)
        xt = add_noise(x0, noise, level).contiguous(memory_format=torch.channels_last)
        target = self.prediction.target(x0, noise, level).clone()
        if old.any():
            target[old] = self.before(xt[old], t[old], batch["tokens"][old])
        answer = self.unet(xt, t, self.text_encoder(batch["tokens"])).float()
        losses = self.losses(answer, target, t)
        if old.any():
            moved = old.float().mean() * self.moved((answer - target)[old], t[old])
            losses |= {"loss": losses["loss"] + moved, "moved": moved}
        return losses

    def moved(self, error: Tensor, t: Tensor) -> Tensor:
        """What else it costs that answers about old scenes are off by so much."""
        return torch.zeros_like(error).mean()

    def preview(self, *how: Any, **more: Any) -> Tensor:
        few = self.captions[:: -(-len(self.captions) // 4)]
        return super().preview(few, *how, **more)


class PairedLoraTask(PairedTask, LoraTask):
    """LoraTask with each example twice, with words and without.

    Of old scenes the guided answer has to stay, too, and at all times: it draws.
    """

    def moved(self, error: Tensor, t: Tensor) -> Tensor:
        told, untold = error.chunk(2)
        guided = untold + self.scale * (told - untold)
        nothing = torch.zeros_like(guided)
        counted = DenoiseTask.losses(self, guided, nothing, t[: len(told)])["loss"]
        return self.guided * counted


def new_lora(
    networks: Mapping[str, nn.Module], layers: Mapping[str, int], alpha: float | None
) -> LoRA:
    """Pairs beside some layers, {pattern: rank}."""
    pairs: dict[str, Pair] = {}
    for targets, rank in layers.items():
        some = with_lora(networks, rank, alpha, targets)
        some.detach()
        pairs.update(some.items())
    return LoRA(pairs).attach(networks)


def make_task(args: argparse.Namespace, lesson: Lesson, pictures: Pictures) -> LoraTask:
    """The model, frozen, with a new LoRA beside some of its layers."""
    dtype = torch.float32  # what is learned are small differences
    sd = StableDiffusion.load(args.model, args.device, dtype)
    check_learner(sd.networks())
    for network in sd.networks().values():
        network.requires_grad_(False)
    both = {"unet": sd.unet, "text_encoder": sd.text_encoder}
    lora = new_lora(both, lesson.layers, args.alpha)
    prior = None
    if lesson.prior and sd.size == (SIZE, SIZE):
        prior = encode_scenes(sd.vae, range(PRIOR)).float() * sd.vae.config.scale
    kind = PairedLoraTask if lesson.paired else LoraTask
    return kind(sd, lora, pictures, prior, lesson.prior)


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """`sdlearn train lora`."""
    parser.description = (
        "Teach a model a word or a style: 20 to 100 pictures with captions, some "
        "minutes on one CPU core for the tiny model. What comes out is one small file, "
        "for --lora."
    )
    add_picture_arguments(parser, SETS, RECIPE, "1e-4")
    add = parser.add_argument
    add("--to", type=Path, required=True, metavar="FILE",
        help="where the LoRA is written: a name that ends in .safetensors")  # fmt: skip
    add("--prompt", default="", metavar="TEXT", help="for pictures without a caption")
    add("--rank", type=int, metavar="R", help="of the matrices (4)")
    add("--alpha", type=float, metavar="A", help="strength is A / rank (the rank)")
    add("--targets", metavar="PATTERN",
        help="which layers change, by diffusers' names (all of attention)")  # fmt: skip
    add("--prior", type=float, metavar="SHARE",
        help="share of old scenes among them, for the tiny model (0.2)")  # fmt: skip
    add("--pairs", action="store_true",
        help="learn each picture with its words and without, as the tiny model's last "
        "stage did; use it for new words there, with twice the batch")  # fmt: skip


def lesson_of(args: argparse.Namespace) -> Lesson:
    """The set's lesson or the reader's own, changed as the arguments say."""
    own = Lesson(partial(read_folder, args.pictures, args.prompt))
    lesson: Lesson = SETS[args.set] if args.set else own
    if args.rank is not None or args.targets is not None:
        rank = LAYERS[ATTENTION] if args.rank is None else args.rank
        lesson = lesson._replace(layers={args.targets or ATTENTION: rank})
    if args.prior is not None:
        lesson = lesson._replace(prior=args.prior)
    paired, recipe = lesson.paired or args.pairs, asked(lesson.recipe, args)
    return lesson._replace(paired=paired, recipe=recipe)


def main(args: argparse.Namespace) -> None:
    """Train, or go on, and write the LoRA."""
    if args.to.suffix != ".safetensors":
        raise ValueError(f"{args.to} is no name for a LoRA: let it end in .safetensors")
    lesson, folder = lesson_of(args), args.runs / f"lora-{args.to.stem}"
    if not 0 <= lesson.prior < 1:
        raise ValueError(f"prior is {lesson.prior}; give a share from 0 to below 1")
    check_writable(args.to)
    pictures = lesson.pictures()
    told = {"layers": lesson.layers, "alpha": args.alpha, "prior": lesson.prior}
    told |= {"pairs": lesson.paired, "pictures": mark_of_pictures(pictures)}
    make = only_again(partial(make_task, args, lesson, pictures), folder, **told)
    how = args.precision, PREVIEW_EVERY
    trained = train_task("lora", make, lesson.recipe, folder, *how)
    task = trained if isinstance(trained, LoraTask) else make()
    if trained is None:  # all steps were done before
        task.load_state_dict(averaged_weights(folder / "state.pt"), strict=False)
    save_lora(args.to, task.lora)
    tell(f"{args.to}: written; draw with --lora {args.to}")
