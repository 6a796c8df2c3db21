"""prompt (and picture) -> pictures: Stable Diffusion, whole. Chapter 12.
Exported from book/12_pipeline.ipynb by `make export`; edit it there.
"""

import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor, nn

from sdlearn.clip import CLIPTextEncoder
from sdlearn.ddpm import draw_noise, kept_timesteps, sample
from sdlearn.guidance import Guided
from sdlearn.pictures import open_image, to_image, to_tensor
from sdlearn.saving import save_pipeline
from sdlearn.schedule import Schedule, add_noise
from sdlearn.speed import TiledVAE, faster
from sdlearn.speed import compiled as compile_blocks
from sdlearn.tokenizer import Tokenizer
from sdlearn.unet import UNet
from sdlearn.vae import VAE
from sdlearn.weights import load

__all__ = [
    "LARGEST",
    "pick_device",
    "default_dtype",
    "seeds",
    "check_fit",
    "PromptCut",
    "Placement",
    "Networks",
    "Drawing",
    "last",
    "texts",
    "count_pictures",
    "latent_shape",
    "StableDiffusion",
]

LARGEST = 4096  # pixels a side of a picture that we draw


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, if it is there; without a wish the fastest: cuda, then mps, then cpu."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    choice = [name for name, available in there.items() if available]
    try:
        found = torch.device(choice[0] if device is None else device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device {device!r} is unknown; this machine has {', '.join(choice)}"
        ) from None
    if found.type not in choice or (
        found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()
    ):
        raise ValueError(
            f"device {device!r} is not available; this machine has {', '.join(choice)}"
        )
    return found


def default_dtype(device: torch.device) -> torch.dtype:
    """What networks compute in where nobody says: 16 bits on an NVIDIA GPU, else 32."""
    return torch.float16 if device.type == "cuda" else torch.float32


def seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed for each picture: seed, seed + 1 ..."""
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
    found = [seed + i for i in range(count)] if type(seed) is int else seed
    valid = isinstance(found, list | tuple) and all(
        type(s) is int and 0 <= s < 2**63 for s in found
    )
    if not valid or len(found) != count:
        raise ValueError(
            f"seed is {seed!r}; give a whole number of at least 0, or a list of {count}, one a picture"
        )
    return list(found)


def check_fit(
    tokenizer: Tokenizer, text_encoder: CLIPTextEncoder, vae: VAE, unet: UNet
) -> None:
    """Do the parts speak the same widths?"""
    text, channels = text_encoder.config, vae.config.latent_channels
    if unet.config.in_channels != channels:
        raise ValueError(
            f"the U-Net takes {unet.config.in_channels} channels, but the VAE makes {channels}; "
            "9 belong to an inpainting model, see chapter 14"
        )
    if unet.config.context_width != text.width or len(tokenizer) > text.vocab:
        raise ValueError(
            f"a tokenizer of {len(tokenizer)} tokens, a text encoder of {text.vocab} and width {text.width}, "
            f"and a U-Net of context width {unet.config.context_width} do not fit: take all from one model"
        )


class PromptCut(UserWarning):
    """A prompt is longer than the text encoder can read."""


class Placement:
    """The three networks: where they live, and in what form.

    dtype: what they compute in. offload: only the one at work is on the device. size: in pixels, as in training.
    Chapter 19's: tiled, the VAE works in tiles; fast, attention takes its fast form; compiled, the U-Net is compiled.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        text_encoder: CLIPTextEncoder,
        vae: VAE,
        unet: UNet,
        schedule: Schedule,
        size: int = 512,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        offload: bool = False,
        name: str = "",
        tiled: bool = False,
        fast: bool = False,
        compiled: bool = False,
    ):
        check_fit(tokenizer, text_encoder, vae, unet)
        self.device = pick_device(device)
        self.dtype = dtype or default_dtype(self.device)
        self.tokenizer, self.schedule, self.size, self.offload, self.name = (
            tokenizer,
            schedule,
            size,
            offload,
            name,
        )
        home = torch.device("cpu") if offload else self.device
        self.text_encoder = text_encoder.to(home, self.dtype).eval()
        self.vae = vae.to(home, self.dtype, memory_format=torch.channels_last).eval()
        self.unet = unet.to(home, self.dtype, memory_format=torch.channels_last).eval()
        self.factor = 2 ** (len(vae.config.channels) - 1)  # pixels a latent
        self.tiles = TiledVAE(self.vae) if tiled else None
        if fast:
            for network in (self.text_encoder, self.vae, self.unet):
                faster(network)
        if compiled:
            compile_blocks(self.unet)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        offload: bool = False,
        ema: bool = False,
        vae: str | Path | None = None,
        tiled: bool = False,
        fast: bool = False,
        compiled: bool = False,
    ) -> Self:
        """From a diffusers folder, an SD 1 file, or OWNER/NAME of the hub.

        device None: cuda, else mps, else cpu; dtype None: float16 on cuda, else float32. ema: a file's averaged U-Net;
        vae: another VAE (both chapter 11's). offload, tiled, fast, compiled: as the class says.
        """
        device = pick_device(device)  # a wrong one is told before gigabytes are read
        name = (
            Path(path).resolve().name.removesuffix(".safetensors").removesuffix(".ckpt")
        )
        parts = load(
            path,
            dtype or default_dtype(device),
            "cpu" if offload else device,
            torch.channels_last,
            ema,
            vae,
        )
        return cls(*parts, device, dtype, offload, name, tiled, fast, compiled)

    def save(
        self, folder: str | Path, dtype: torch.dtype | None = torch.float16
    ) -> None:
        """Write everything in diffusers' folder layout."""
        parts = (self.tokenizer, self.text_encoder, self.vae, self.unet, self.schedule)
        save_pipeline(folder, *parts, dtype=dtype, size=self.size)

    def use(self, network: nn.Module) -> nn.Module:
        """The network, on the device; with offload the other two leave it first."""
        if self.offload:
            for other in (self.text_encoder, self.vae, self.unet):
                if other is not network:
                    other.to("cpu")
            network.to(self.device)
        return network

    def codec(self) -> VAE | TiledVAE:
        """The VAE, in tiles if that was asked for."""
        vae = self.use(self.vae)
        return self.tiles or vae


class Networks(Placement):
    """What each of the three does in one call; all that they give back is float32."""

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], clip_skip: int = 0) -> Tensor:
        """Texts -> context (B, S, D); what does not fit is cut, with a warning."""
        room = self.tokenizer.positions - 2
        for prompt in prompts:
            if cut := self.tokenizer.dropped(prompt):
                warnings.warn(
                    f"a prompt is cut after {room} tokens; its end is lost: {cut}",
                    PromptCut,
                    stacklevel=2,
                )
        return self.use(self.text_encoder)(
            self.tokenizer(prompts).to(self.device), clip_skip
        )

    @torch.no_grad()
    def encode_image(
        self, image: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """image (1, 3, H, W) in [-1, 1] -> latents, one sample for each generator."""
        distribution = self.codec().encode(image.to(self.device, self.dtype))
        return self.vae.config.scale * torch.cat(
            [distribution.sample(generator).float() for generator in generators]
        )

    @torch.no_grad()
    def denoise(self, latents: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The U-Net's answer."""
        return self.use(self.unet)(latents.to(self.dtype), t, context).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """latents (B, 4, H/8, W/8) -> pictures, one after the other, since this takes the most memory of all."""
        vae = self.codec()
        return [
            to_image(vae.decode(x[None].to(self.device, self.dtype))[0])
            for x in latents
        ]


class Drawing(NamedTuple):
    """The pictures after one step: latents as they are now, x0 as the U-Net guesses that they will end."""

    index: int
    total: int
    t: int
    latents: Tensor
    x0: Tensor
    decode: Callable[[Tensor], list[Image.Image]]

    def preview(self) -> list[Image.Image]:
        """x0 as pictures."""
        return self.decode(self.x0)

    def images(self) -> list[Image.Image]:
        """The latents as pictures: noisy until the last step."""
        return self.decode(self.latents)


def last(drawings: Iterator[Drawing]) -> list[Image.Image]:
    """The finished pictures."""
    return deque(drawings, maxlen=1).pop().images()


def texts(value: str | Sequence[str], name: str) -> list[str]:
    """One text or several, as a list."""
    found = [value] if isinstance(value, str) else value
    if (
        not isinstance(found, list | tuple)
        or not found
        or not all(isinstance(text, str) for text in found)
    ):
        raise ValueError(f"{name} is {value!r}; give a text, or a list of texts")
    return list(found)


def count_pictures(prompts: Sequence[str], negatives: Sequence[str], n: int) -> int:
    """How many pictures there will be: n for each prompt."""
    if len(negatives) not in (1, len(prompts)):
        raise ValueError(
            f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each"
        )
    if type(n) is not int or not 1 <= n <= 1000:
        raise ValueError(f"n is {n!r}; give a whole number of pictures from 1 to 1000")
    return n * len(prompts)


def latent_shape(
    sd: Networks,
    count: int,
    height: int | None,
    width: int | None,
    latents: Tensor | None,
) -> tuple[int, int, int, int]:
    """(B, 4, h, w) from a height and width in pixels, or from latents that were passed."""
    wanted = [count, sd.vae.config.latent_channels]
    if latents is not None:
        given = list(latents.shape)
        asked = [*wanted, *(side and side // sd.factor for side in (height, width))]
        if len(given) != 4 or any(
            b is not None and a != b for a, b in zip(given, asked, strict=True)
        ):
            shape = ", ".join("any" if side is None else str(side) for side in asked)
            raise ValueError(
                f"latents are {tuple(given)}, but ({shape}) is wanted: one for each picture, in its size"
            )
        height, width = (side * sd.factor for side in given[2:])
    for name, side in (("height", height), ("width", width)):
        side = sd.size if side is None else side
        if type(side) is not int or side % sd.factor or not 0 < side <= LARGEST:
            raise ValueError(
                f"{name} is {side!r}; give a multiple of {sd.factor}, from {sd.factor} to {LARGEST} pixels"
            )
        wanted.append(side // sd.factor)
    return tuple(wanted)


class StableDiffusion(Networks):
    """Text -> pictures, and text + picture -> pictures. Rombach et al. 2022, figure 3."""

    def steps(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        steps: int = 50,
        cfg_scale: float = 7.5,
        sampler: str = "ddpm",
        seed: int | Sequence[int] | None = None,
        width: int | None = None,
        height: int | None = None,
        n: int = 1,
        latents: Tensor | None = None,
        rescale: float = 0.0,
        clip_skip: int = 0,
        image: Image.Image | str | Path | None = None,
        strength: float = 0.8,
        guided_times: tuple[int, int] = (0, 1000),
        two_passes: bool = False,
    ) -> Iterator[Drawing]:
        """As txt2img, or as img2img if there is an image, but yields a `Drawing` after every step."""
        prompts, negatives = (
            texts(prompt, "prompt"),
            texts(negative_prompt, "negative_prompt"),
        )
        count = count_pictures(prompts, negatives, n)
        shape = latent_shape(self, count, height, width, latents)
        times = (
            self.schedule.timesteps(steps)
            if image is None
            else kept_timesteps(self.schedule, steps, strength)
        )
        generators = [torch.Generator().manual_seed(s) for s in seeds(seed, count)]
        if image is not None:
            image = image if isinstance(image, Image.Image) else open_image(image)
            image = to_tensor(
                image, width=shape[3] * self.factor, height=shape[2] * self.factor
            )
        context = self.encode_prompts(prompts, clip_skip).repeat_interleave(n, 0)
        negative = (
            self.encode_prompts(negatives, clip_skip) if cfg_scale > 1 else context
        )
        negative = negative.repeat_interleave(count // len(negative), 0)
        guided = Guided(
            self.denoise,
            context,
            negative,
            cfg_scale,
            rescale,
            guided_times,
            two_passes,
        )
        x0 = None if image is None else self.encode_image(image, generators)
        xt = (
            draw_noise(shape, generators, self.device)
            if latents is None
            else latents.detach().to(self.device).float()
        )
        xt = xt if x0 is None else add_noise(self.schedule, x0, xt, int(times[0]))
        walk = sample(guided, xt, self.schedule, times, sampler, generators)
        return (
            Drawing(step.index, len(times), step.t, step.latents, step.x0, self.decode)
            for step in walk
        )

    def txt2img(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        steps: int = 50,
        cfg_scale: float = 7.5,
        sampler: str = "ddpm",
        seed: int | Sequence[int] | None = None,
        width: int | None = None,
        height: int | None = None,
        n: int = 1,
        latents: Tensor | None = None,
        rescale: float = 0.0,
        clip_skip: int = 0,
        guided_times: tuple[int, int] = (0, 1000),
        two_passes: bool = False,
    ) -> list[Image.Image]:
        """n pictures for each prompt, of width x height pixels (`size` by default).

        seed: picture i is drawn from seed + i, whatever the batch or the device; or a list, one for each picture.
        latents: (B, 4, H/8, W/8) to start from instead of the seed's noise.
        guided_times, two_passes: where guidance works, and whether its halves run one after the other (chapter 19).
        """
        return last(
            self.steps(
                prompt,
                negative_prompt,
                steps,
                cfg_scale,
                sampler,
                seed,
                width,
                height,
                n,
                latents,
                rescale,
                clip_skip,
                None,
                0.8,
                guided_times,
                two_passes,
            )
        )

    def img2img(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | str | Path,
        strength: float = 0.8,
        negative_prompt: str | Sequence[str] = "",
        steps: int = 50,
        cfg_scale: float = 7.5,
        sampler: str = "ddpm",
        seed: int | Sequence[int] | None = None,
        width: int | None = None,
        height: int | None = None,
        n: int = 1,
        rescale: float = 0.0,
        clip_skip: int = 0,
        guided_times: tuple[int, int] = (0, 1000),
        two_passes: bool = False,
    ) -> list[Image.Image]:
        """n new pictures for each prompt, that begin as `image`; Meng et al. 2022, section 3.

        strength: the share of the steps that is run, from above 0 (keep it) to 1 (forget it). A picture of any kind
        is scaled and cropped at its centre to width x height; transparent becomes white.
        """
        return last(
            self.steps(
                prompt,
                negative_prompt,
                steps,
                cfg_scale,
                sampler,
                seed,
                width,
                height,
                n,
                None,
                rescale,
                clip_skip,
                image,
                strength,
                guided_times,
                two_passes,
            )
        )
