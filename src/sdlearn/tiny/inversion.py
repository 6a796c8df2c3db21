"""a few pictures -> a word, or a model that knows one: textual inversion, DreamBooth.

`sdlearn train textual-inversion` finds the vectors of a new word and changes nothing
else; `sdlearn train dreambooth` changes the U-Net itself. See chapter 15.
"""

import argparse
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdlearn.disk import check_writable, write_files
from sdlearn.inversion import FORMS, Embedding, NewRows, write_embedding
from sdlearn.lora import save_lora, with_lora
from sdlearn.pictures import save_png, to_tensor
from sdlearn.pipeline import StableDiffusion, last
from sdlearn.request import Request, number, whole_number
from sdlearn.tiny.lora import WORD, Pictures, unicorns
from sdlearn.tiny.own import (
    add_picture_arguments,
    asked,
    check_learner,
    mark_of,
    mark_of_pictures,
    only_again,
    read_folder,
)
from sdlearn.tiny.recipe import tell, text_writer, train_task
from sdlearn.tiny.tasks import DenoiseTask, normal
from sdlearn.training import Recipe, averaged_weights

RECIPES = {
    "textual-inversion": Recipe(
        steps=120, batch=16, lr=0.03, warmup=10, cooldown=80, decay=0.0, ema=0.95
    ),
    "dreambooth": Recipe(
        steps=120, batch=4, lr=6e-4, warmup=10, cooldown=60, decay=0.0, ema=0.9
    ),
}
CLASS_PICTURES = 200
PREVIEW_EVERY = 100  # steps


@torch.no_grad()
def latents_of(sd: StableDiffusion, pictures: Pictures) -> Tensor:
    """(N, 4, h, w), in the size that the model was trained in."""
    height, width = sd.size
    images = (to_tensor(image, width, height) for image, _ in pictures)
    vae = sd.use("vae")
    found = [vae.encode(x.to(sd.device, sd.dtype)).mean for x in images]
    return torch.cat(found).float().cpu()


class PicturesTask(DenoiseTask):
    """DenoiseTask on pictures that somebody gives, each with its caption.

    prior: other pictures, which as many examples of a step show. Their error counts
    `weight` times as much (prior preservation; Ruiz et al. 2023, section 3.3).
    """

    def __init__(
        self,
        sd: StableDiffusion,
        pictures: Pictures,
        prior: Pictures = (),
        weight: float = 1.0,
        **more: Any,
    ):
        latents = latents_of(sd, [*pictures, *prior])
        parts = sd.unet, sd.text_encoder, sd.tokenizer, latents, sd.schedule
        super().__init__(*parts, vae=sd.vae, prediction=sd.prediction, **more)
        self.captions = [caption for _, caption in (*pictures, *prior)]
        self.own, self.weight = len(pictures), weight

    def examples(self, rngs: Sequence[random.Random]) -> dict[str, Tensor]:
        every = len(self.latents)
        numbers = [rng.randrange(self.own) for rng in rngs]
        if every > self.own:  # the second half of the batch
            half = rngs[len(rngs) // 2 :]
            numbers[len(rngs) // 2 :] = [rng.randrange(self.own, every) for rng in half]
        told = [
            "" if rng.random() < self.drop else self.captions[n]
            for n, rng in zip(numbers, rngs, strict=True)
        ]
        channels, *size = self.latents.shape[1:]
        return {
            "latents": self.latents[numbers],
            "tokens": self.tokenizer(told),
            "t": self.times(rngs),
            "noise": normal(rngs, channels, *size)
            + self.offset * normal(rngs, channels, 1, 1),
        }

    def losses(self, answer: Tensor, target: Tensor, t: Tensor) -> dict[str, Tensor]:
        if len(self.latents) == self.own:
            return super().losses(answer, target, t)
        cut = [len(t) // 2]  # as in examples
        halves = zip(*(x.tensor_split(cut) for x in (answer, target, t)), strict=True)
        own, prior = (super(PicturesTask, self).losses(*half) for half in halves)
        loss = own["loss"] + self.weight * prior["loss"]
        return own | {"loss": loss, "prior": prior["loss"]}

    def preview(self, *how: Any, **more: Any) -> Tensor:
        few = self.captions[: self.own : -(-self.own // 4)]
        return super().preview(few, *how, **more)


class InversionTask(PicturesTask):
    """Find the vectors of a new word, and change nothing else.

    Gal et al. 2023, section 3. like: words from whose vectors the new ones begin.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        pictures: Pictures,
        token: str,
        count: int = 1,
        like: str = "a",
        **more: Any,
    ):
        super().__init__(sd, pictures, **{"drop": 0.0} | more)
        self.requires_grad_(False)
        known = self.tokenizer.encode(like)
        if not known:
            raise ValueError("the word to begin with is empty; give one, such as cat")
        self.tokenizer, self.token = self.tokenizer.with_word(token, count), token
        new = self.tokenizer.encode(token)[0]
        for caption in self.captions:
            if new not in self.tokenizer.encode(caption):
                raise ValueError(
                    f"the caption {caption!r} does not say {token}; each caption has "
                    "to, so that the word is learned"
                )
        table = self.text_encoder.token_embedding.weight[:new]
        begin = table[[known[i % len(known)] for i in range(count)]]
        rows = NewRows(table, begin)
        self.text_encoder.token_embedding = rows  # type: ignore[assignment]

    def learned(self) -> Embedding:
        table = self.text_encoder.token_embedding
        assert isinstance(table, NewRows)
        return Embedding(self.token, table.rows.detach().clone())


class DreamBoothTask(PicturesTask):
    """Teach the U-Net, or a LoRA beside it, what a few pictures show.

    Ruiz et al. 2023. prior: class pictures; rank: that of a LoRA, 0 for none.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        pictures: Pictures,
        prior: Pictures = (),
        rank: int = 0,
        **more: Any,
    ):
        super().__init__(sd, pictures, prior, **more)
        self.unet.requires_grad_(True)
        self.lora = with_lora({"unet": self.unet}, rank) if rank else None


def own_pictures(args: argparse.Namespace, word: str, prompt: str) -> Pictures:
    """The reader's, or those of the unicorn with `word` in their captions.

    prompt: the caption of the reader's pictures that have none.
    """
    if args.pictures:
        return read_folder(args.pictures, prompt)
    known = re.compile(rf"\b{WORD}\b")
    return [(image, known.sub(lambda _: word, text)) for image, text in unicorns()]


def class_pictures(
    sd: StableDiffusion, prompts: Sequence[str], folder: Path, count: int
) -> Pictures:
    """What the model itself draws for the prompts, by turns.

    Made once, and kept: a PNG and its caption each. An interrupted run goes on.
    """
    wanted = [prompts[i % len(prompts)] for i in range(count)]
    for i, prompt in enumerate(wanted):
        path = folder / f"{i:04d}.png"
        if path.with_suffix(".txt").exists():
            continue
        request = Request(prompt, sampler="dpmpp_2m", steps=20, seed=i)
        (picture,) = last(sd.draw(request))
        save_png(picture, path, request.parameters(0, *picture.size, sd.name))
        write_files({path.with_suffix(".txt"): text_writer(prompt)})
        if i % 20 == 0:
            tell(f"{path}: class picture {i + 1} of {count}, {prompt}")
    found = read_folder(folder)[:count]
    if [caption for _, caption in found] != wanted:
        raise ValueError(
            f"{folder} holds class pictures of other prompts; remove it, or give "
            "another folder with --runs"
        )
    return found


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """`sdlearn train textual-inversion` and `sdlearn train dreambooth`."""
    usual = "5e-6" if name == "dreambooth" else "5e-3"
    add_picture_arguments(parser, [WORD], RECIPES[name], usual)
    add = parser.add_argument
    if name == "dreambooth":
        parser.description = (
            "Teach a model what a few pictures show, by changing all of its U-Net: 5 "
            "to 20 pictures, a rare word for them, and prompts for what must not be "
            "forgotten. A few minutes on one CPU core for the tiny model, and 0.3 GB "
            "of disk; SD 1.5 needs a GPU of 24 GB, or --rank."
        )
        add("--to", type=Path, required=True, metavar="PATH",
            help="a folder for the model; with --rank a .safetensors file")  # fmt: skip
        add("--prompt", default="", metavar="TEXT",
            help="for pictures without a caption, such as 'a zwx dog'")  # fmt: skip
        add("--class-prompt", nargs="+", default=[], metavar="TEXT",
            help="what must not be forgotten, such as 'a dog' (nothing)")  # fmt: skip
        add("--class-pictures", type=int, default=CLASS_PICTURES, metavar="N",
            help=f"drawn for it beforehand, once ({CLASS_PICTURES})")  # fmt: skip
        add("--prior", type=float, default=1.0, metavar="W",
            help="how much their error counts (1)")  # fmt: skip
        add("--rank", type=int, default=0, metavar="R",
            help="learn a LoRA of this rank, not the whole U-Net")  # fmt: skip
    else:
        parser.description = (
            "Find the vectors of a new word for what 3 to 100 pictures show; the model "
            "stays as it is. Three minutes on one CPU core for the tiny model. The "
            "result is one tiny file, for --embedding."
        )
        add("--to", type=Path, required=True, metavar="FILE",
            help="it ends in .safetensors, .bin or, for A1111, in .pt")  # fmt: skip
        add("--token", default=f"<{WORD}>", metavar="WORD",
            help=f"the new word, which each caption says (<{WORD}>)")  # fmt: skip
        add("--vectors", type=int, default=1, metavar="N", help="how many it has (1)")
        add("--like", default="rabbit", metavar="WORD",
            help="a word from whose vectors it begins (rabbit)")  # fmt: skip
        add("--prompt", metavar="TEXT",
            help="for pictures without a caption ('a' and the word)")  # fmt: skip


def learn(
    args: argparse.Namespace, make: Callable[[], Any], twice: bool = False, **told: Any
) -> Any:
    """Train, or go on, in a folder of its own; the task with its averaged weights.

    twice: each step sees class pictures, too. told: what it learns from.
    """
    name, recipe = args.stage, asked(RECIPES[args.stage], args)
    recipe = replace(recipe, batch=recipe.batch * (1 + twice))
    folder = args.runs / f"{name}-{args.to.stem}"
    make = only_again(make, folder, **told)
    task = train_task(name, make, recipe, folder, args.precision, PREVIEW_EVERY)
    if task is None:  # all steps were done before
        task = make()
        task.load_state_dict(averaged_weights(folder / "state.pt"), strict=False)
    return task


def main(args: argparse.Namespace) -> None:
    """Train, or go on, and write the word, the model or the LoRA."""
    if args.stage == "dreambooth":
        whole_number(0, 10**4)("rank", args.rank)
        whole_number(1, 10**5)("class-pictures", args.class_pictures)
        number(0, 1e6, "a finite number, 0 or more")("prior", args.prior)
    whole = args.stage == "dreambooth" and not args.rank
    suffixes = {"dreambooth": (".safetensors",)}.get(args.stage, FORMS)
    if not whole and args.to.suffix not in suffixes:
        raise ValueError(
            f"{args.to} does not say its format; give a name that ends in "
            f"{', '.join(suffixes)}"
        )
    check_writable(args.to / "model_index.json" if whole else args.to)
    sd = StableDiffusion.load(args.model, args.device, torch.float32)
    check_learner(sd.networks())
    if args.stage == "textual-inversion":
        prompt = f"a {args.token}" if args.prompt is None else args.prompt
        pictures = own_pictures(args, args.token, prompt)
        how = sd, pictures, args.token, args.vectors, args.like
        told = {"vectors": args.vectors, "like": args.like}
        told |= {"token": args.token, "pictures": mark_of_pictures(pictures)}
        task = learn(args, partial(InversionTask, *how), **told)
        write_embedding(args.to, task.learned())
        tell(
            f"{args.to}: written; draw with --embedding {args.to} and {args.token} in "
            "the prompt"
        )
        return
    pictures = own_pictures(args, WORD, args.prompt)
    prior: Pictures = ()
    if args.class_prompt:
        folder = args.runs / f"dreambooth-{args.to.stem}" / "class"
        prior = class_pictures(sd, args.class_prompt, folder, args.class_pictures)
    make = partial(DreamBoothTask, sd, pictures, prior, args.rank, weight=args.prior)
    told = {"U-Net": mark_of(sd.unet), "rank": args.rank, "prior": args.prior}
    told |= {"pictures": mark_of_pictures(pictures)}
    told |= {"class pictures": mark_of_pictures(prior)}
    task = learn(args, make, twice=bool(prior), **told)
    if task.lora is None:
        sd.save(args.to)
        tell(f"{args.to}: written; draw with --model {args.to}")
    else:
        save_lora(args.to, task.lora)
        tell(f"{args.to}: written; draw with --lora {args.to}")
