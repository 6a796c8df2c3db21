"""prompt (and picture) -> pictures: Stable Diffusion, whole. Chapter 12.
Exported from book/12_pipeline.ipynb, book/14_inpainting.ipynb and book/17_sdxl.ipynb
by `make export`; edit it there.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, Unpack

import torch
from PIL import Image
from torch import Tensor, nn

from sdlearn.checkpoint.files import human
from sdlearn.checkpoint.load import (
    Parts,
    check_texts,
    free_memory,
    is_fast,
    kept,
    load,
    save,
)
from sdlearn.guidance import Conditioning, Guided
from sdlearn.inpaint import Inpaint
from sdlearn.lcm import told_guidance
from sdlearn.pictures import to_image, to_tensor
from sdlearn.prediction import EPSILON, Prediction
from sdlearn.request import LARGEST, Request, Settings, Setup, picture
from sdlearn.samplers import SAMPLERS, Denoiser, Dice, draw_noise, keep, sample
from sdlearn.schedule import Level, Schedule, add_noise
from sdlearn.unet import AddedEmbedding


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, if it is there; without a wish the fastest that is."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = {"cuda": cuda, "mps": mps, "cpu": True}
    choice = [name for name, available in there.items() if available]
    have = f"this machine has {', '.join(choice)}"
    try:
        found = torch.device(choice[0] if device is None else device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device {device!r} is unknown; {have}") from None
    number = found.index or 0
    if found.type not in choice or (cuda and number >= torch.cuda.device_count()):
        raise ValueError(f"device {device!r} is not available; {have}")
    return found


def default_dtype(device: torch.device) -> torch.dtype:
    """What networks compute in by default: 16 bits on an NVIDIA GPU, else 32."""
    return torch.float16 if device.type == "cuda" else torch.float32


def check_fit(parts: dict[str, Any]) -> None:
    """Do the parts speak the same widths?"""
    unet, channels = parts["unet"].config, parts["vae"].config.latent_channels
    known = channels, 2 * channels + 1  # plain, or inpainting
    if unet.in_channels not in known or unet.out_channels != channels:
        raise ValueError(
            f"the U-Net takes {unet.in_channels} channels and answers "
            f"{unet.out_channels}, but the VAE makes {channels}: take both of one model"
        )
    check_texts({name: getattr(x, "config", x) for name, x in parts.items()})


def check_use(parts: dict[str, Any], extras: Sequence[Any]) -> None:
    """A U-Net that was trained to see a mask has to get one."""
    takes = parts["unet"].config.in_channels
    plain = takes == parts["vae"].config.latent_channels
    if not plain and not any(hasattr(extra, "mask") for extra in extras):
        raise ValueError(
            f"this model was made for inpainting, its U-Net takes {takes} channels: "
            "give it a picture and a mask (sd.inpaint, sdlearn inpaint)"
        )


class PromptCut(UserWarning):
    """A prompt is longer than the text encoder can read."""


def warn_of_cuts(tokenizer: Any, prompts: Sequence[str]) -> None:
    """Say which words will not be heard."""
    for prompt in prompts:
        if cut := tokenizer.dropped(prompt):
            room = tokenizer.positions - 2  # beside <start> and <end>
            text = f"a prompt is cut after {room} tokens; its end is lost: {cut}"
            warnings.warn(text, PromptCut, stacklevel=3)


def warn_of_memory(vae: Any, pixels: Sequence[int], device: torch.device) -> None:
    """Say before the first step that a picture will be too large to decode.

    Where the decoder reaches the picture's size, a convolution has its input and its
    output at once; no decoding takes less. A `TiledVAE` sees one tile at a time.
    """
    factor, channels = 2 ** (len(vae.config.channels) - 1), vae.config.channels[:2][-1]
    tile = getattr(vae, "tile", None)
    height, width = (min(side, factor * tile) if tile else side for side in pixels)
    size = next(vae.parameters()).itemsize
    need, free = 2 * channels * height * width * size, free_memory(device)
    if free is not None and need > free:
        advice = "" if tile else "add --tiled (speed_up(sd, tiled=True)), or "
        warnings.warn(
            f"decoding {pixels[1]}x{pixels[0]} pixels takes {human(need)} of memory or "
            f"more, but only {human(free)} are free: {advice}draw a smaller picture",
            stacklevel=2,
        )


def latent_shape(
    request: Request, size: tuple[int, int], channels: int, factor: int
) -> tuple[int, ...]:
    """(B, C, h, w), from pixels, or from the latents that the request brings along."""
    given, shape = request.latents, [request.count, channels]
    for i, name in enumerate(("height", "width")):
        side = getattr(request, name)
        if side is None:
            side = size[i] if given is None else given.shape[2 + i] * factor
        if side % factor:
            raise ValueError(
                f"{name} is {side}; give a multiple of {factor}, "
                f"from {factor} to {LARGEST} pixels"
            )
        shape.append(side // factor)
    if given is not None and list(given.shape) != shape:
        raise ValueError(
            f"latents are {tuple(given.shape)}, but {tuple(shape)} is wanted: "
            "one for each picture, in its size"
        )
    return tuple(shape)


class Drawing(NamedTuple):
    """The pictures after one step: latents as they are now, and x0, what the network
    guessed before the step that they will become. total: the number of steps."""

    index: int  # type: ignore[assignment]  # tuples have a method of this name
    t: float
    latents: Tensor
    x0: Tensor
    total: int
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


class StableDiffusion:
    """Text -> pictures, and text + picture -> pictures. Rombach et al. 2022, figure 3.

    parts: tokenizer, text_encoder, vae, unet; in SDXL also tokenizer_2 and
    text_encoder_2. size: (height, width) in pixels, as in training. dtype: what the
    networks compute in. offload: only the network at work is on the device, the others
    wait on the CPU.
    """

    def __init__(
        self,
        parts: dict[str, Any],
        schedule: Schedule,
        prediction: Prediction = EPSILON,
        size: tuple[int, int] = (512, 512),
        name: str = "",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        offload: bool = False,
    ):
        check_fit(parts)
        self.parts, self.schedule, self.prediction = dict(parts), schedule, prediction
        self.size, self.name, self.offload = size, name, offload
        self.device = pick_device(device)
        self.dtype = dtype or default_dtype(self.device)
        home = torch.device("cpu") if offload else self.device
        for network in self.networks().values():
            network.to(home, kept(network, self.dtype)).eval()
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.factor = 2 ** (len(self.vae.config.channels) - 1)  # pixels a latent

    def __getattr__(self, name: str) -> Any:
        """The parts by their names: `sd.unet`."""
        parts = self.__dict__.get("parts", {})
        if name not in parts:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return parts[name]

    def __setattr__(self, name: str, value: object) -> None:
        """`sd.unet = other` exchanges the part."""
        if name in self.__dict__.get("parts", {}):
            self.parts[name] = value
        else:
            super().__setattr__(name, value)

    def networks(self) -> dict[str, nn.Module]:
        """Those of the parts that compute."""
        return {k: p for k, p in self.parts.items() if isinstance(p, nn.Module)}

    def use(self, name: str) -> Any:
        """A network, on the device; with offload the others leave it first."""
        network = self.parts[name]
        if self.offload:
            for other in self.networks().values():
                if other is not network:
                    other.to("cpu")
            network.to(self.device)
        return network

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], clip_skip: int = 0) -> Conditioning:
        """Texts -> what the U-Net takes beside latents and time, each (B,...)."""
        if "text_encoder_2" in self.parts:
            return self.encode_xl(prompts, clip_skip)
        warn_of_cuts(self.parts["tokenizer"], prompts)
        tokens = self.parts["tokenizer"](prompts).to(self.device)
        return {"context": self.use("text_encoder")(tokens, clip_skip)}

    @torch.no_grad()
    def encode_image(self, image: Tensor, dice: Sequence[torch.Generator]) -> Tensor:
        """image (1,3,H,W) in [-1,1] -> latents, float32, one for each generator."""
        vae = self.use("vae")
        latents = vae.encode(image.to(self.device, kept(vae, self.dtype)))
        return torch.cat([latents.sample(generator).float() for generator in dice])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """latents (B,4,h,w) -> pictures, one by one: this takes most memory."""
        vae = self.use("vae")
        latents = latents.to(self.device, kept(vae, self.dtype))
        return [to_image(vae.decode(x[None])[0]) for x in latents]

    def network(self, request: Request) -> Callable[..., Tensor]:
        """(latents (B,4,h,w), t (B,), **conditioning) -> the U-Net's answer, float32.

        The place to wrap the U-Net. One that is told its guidance is told it here.
        """
        told = told_guidance(self.unet.config, request.cfg_scale, self.device)

        @torch.no_grad()
        def answer(latents: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
            conditioning |= told
            return self.use("unet")(latents.to(self.dtype), t, **conditioning).float()

        return answer

    def told(self, request: Request) -> tuple[Conditioning, Conditioning | None]:
        """What the U-Net is told of prompts and, with guidance, of negative prompts."""

        def encode(prompts: Sequence[str]) -> Conditioning:
            found, each = self.encode(prompts, request.clip_skip), request.count
            each //= len(prompts)
            return {name: x.repeat_interleave(each, 0) for name, x in found.items()}

        hears = self.unet.config.guidance_width  # then it needs no second half
        guided = request.cfg_scale > 1 and not hears
        uncond = encode(request.negative_prompt) if guided else None
        told = encode(request.prompt), uncond
        return self.told_xl(request, *told) if self.unet.config.added else told

    def guided(
        self,
        request: Request,
        network: Callable[..., Tensor] | None = None,
        told: tuple[Conditioning, Conditioning | None] | None = None,
    ) -> Guided:
        """A network, without a wish our own, with what it is told of the prompts."""
        cond, uncond = told or self.told(request)
        how = request.rescale, request.guided_times, request.two_passes
        network = network or self.network(request)
        scale = 1.0 if uncond is None else request.cfg_scale
        return Guided(network, cond, uncond, scale, *how)

    def levels(self, request: Request) -> list[Level]:
        """Where the latents pass; with a picture, only the last part of the way."""
        strength = 1.0 if request.image is None else request.strength
        sampler, n, spacing = SAMPLERS[request.sampler], request.steps, request.spacing
        if sampler.levels and spacing is None:
            return sampler.levels(self.schedule, n, strength)
        return keep(self.schedule.levels(n, spacing, sampler.clean), strength)

    def first_noise(self, shape: Sequence[int], dice: Dice) -> Tensor:
        """(B,4,h,w) to start from. The schedule knows whether its mean may stray, as
        it did in training."""
        noise, far = draw_noise(shape, dice, self.device), self.schedule.noise_offset
        if far:
            noise = noise + far * draw_noise((*shape[:2], 1, 1), dice, self.device)
        return noise

    def set_up(self, request: Request) -> Setup:
        """What a request asks for, and then what its extras make of it."""
        check_use(self.parts, request.extras)
        channels, levels = self.vae.config.latent_channels, self.levels(request)
        shape = latent_shape(request, self.size, channels, self.factor)
        sides = [side * self.factor for side in shape[2:]]
        warn_of_memory(self.vae, sides, self.device)
        dice = [torch.Generator().manual_seed(seed) for seed in request.seed]
        x0, given = None, request.latents
        if request.image is not None:
            x0 = self.encode_image(to_tensor(request.image, *sides[::-1]), dice)
        if given is not None:
            noise = given.detach().to(self.device).float()
        else:
            noise = self.first_noise(shape, dice)
        start = noise if x0 is None else add_noise(x0, noise, levels[0])
        way = shape, levels, dice, self.network(request)
        told = self.told(request)
        setup = Setup(request, *way, noise, x0, start, self.decode, told=told)
        for extra in (*request.extras, *request.control):
            setup = extra(self, setup)
        return setup

    def draw(self, request: Request) -> Iterator[Drawing]:
        """A `Drawing` after each step; all is checked before the first."""
        setup = self.set_up(request)
        guided = self.guided(request, setup.network, setup.told)
        denoise = Denoiser(guided, self.schedule, self.prediction)
        how = SAMPLERS[request.sampler], setup.dice, request.eta, setup.after
        walk = sample(denoise, setup.start, setup.levels, *how)
        return (Drawing(*step, len(setup.levels) - 1, setup.decode) for step in walk)

    def steps(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | str | Path | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[Drawing]:
        """As txt2img, or as img2img if there is an image, but a `Drawing` a step."""
        return self.draw(Request(prompt, image=image, **settings))

    def txt2img(
        self, prompt: str | Sequence[str], **settings: Unpack[Settings]
    ) -> list[Image.Image]:
        """n pictures for each prompt; `Request` says what can be set."""
        return last(self.steps(prompt, **settings))

    def img2img(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | str | Path,
        **settings: Unpack[Settings],
    ) -> list[Image.Image]:
        """n new pictures for each prompt, that begin as `image`; Meng et al. 2022.

        A picture of any kind is scaled and cropped at its centre to width x height;
        transparent becomes white.
        """
        if image is None:
            raise ValueError("image is None; give a picture, or take txt2img")
        return last(self.steps(prompt, image=image, **settings))

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        offload: bool = False,
        ema: bool = False,
        vae: str | Path | None = None,
    ) -> Self:
        """From a diffusers folder, a single file, or OWNER/NAME of the hub.

        device None: cuda, else mps, else cpu; dtype None: float16 on cuda, else
        float32. ema: a file's averaged U-Net; vae: another VAE, a file or a folder.
        """
        device = pick_device(device)  # a wrong one is told before gigabytes are read
        dtype, home = dtype or default_dtype(device), "cpu" if offload else device
        loaded = load(path, dtype, home, torch.channels_last, ema, vae)
        return cls(*loaded, device, dtype, offload)

    def save(self, path: str | Path, dtype: torch.dtype | None = torch.float16) -> None:
        """Write a folder in diffusers' layout, or one file if the path ends in
        .safetensors or .ckpt."""
        parts = self.parts, self.schedule, self.prediction, self.size, self.name
        save(path, Parts(*parts), dtype)

    def inpaint(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | str | Path,
        mask: Image.Image | str | Path,
        resample: int = 1,
        paste: bool = True,
        soft: float = 0.0,
        **settings: Unpack[Settings],
    ) -> list[Image.Image]:
        """Paints anew what is white in the mask; `Inpaint` says what can be set.

        strength is 1 if nothing else is said: under the hole nothing is kept.
        """
        mine = Inpaint(mask, resample, paste, soft)
        settings = {"strength": 1.0, **settings}
        settings["extras"] = [mine, *settings.get("extras", ())]
        return last(self.steps(prompt, picture("image", image), **settings))

    @torch.no_grad()
    def encode_xl(self, prompts: Sequence[str], clip_skip: int = 0) -> Conditioning:
        """SDXL: the words as the last layer but one of each text encoder knows them,
        side by side; and `pooled`, the whole text as the second encoder knows it."""
        warn_of_cuts(self.parts["tokenizer_2"], prompts)
        words = []
        for name in ("text_encoder", "text_encoder_2"):
            if name not in self.parts:  # a refiner has no first one
                continue
            encoder = self.use(name)
            if clip_skip >= encoder.config.layers:
                raise ValueError(
                    f"skip is {clip_skip}: choose 0 to {encoder.config.layers - 1}, "
                    "the number of layers to leave out beside the last one"
                )
            tokenizer = self.parts[name.replace("text_encoder", "tokenizer")]
            tokens = tokenizer(prompts).to(self.device)
            states = encoder.hidden_states(tokens)
            words.append(states[-2 - clip_skip])
        end = encoder.pool(tokens, encoder.final_layer_norm(states[-1]))
        pooled = encoder.text_projection(end)
        return {"context": torch.cat(words, dim=-1), "pooled": pooled}

    def is_refiner(self) -> bool:
        """Does it hear a score in place of the target size?"""
        second = self.parts.get("text_encoder_2")
        pooled = second.config.projection if second else 0
        return self.unet.config.added == pooled + 5 * AddedEmbedding.waves

    def told_xl(
        self, request: Request, cond: Conditioning, uncond: Conditioning | None
    ) -> tuple[Conditioning, Conditioning | None]:
        """SDXL: an empty negative prompt as in training, and the ids, none cropped."""
        if self.is_refiner() and request.image is None and request.latents is None:
            raise ValueError(
                "this model is a refiner, which goes on with what another has begun; "
                "give it an image, or the latents of an SDXL model"
            )
        dear = request.steps > 8 or uncond is not None
        if dear and is_fast(self.schedule, self.prediction):
            text = "this model draws in 1 to 4 steps, without guidance: take steps 4"
            warnings.warn(f"{text}, cfg_scale 1, sampler euler_a", stacklevel=2)
        if uncond is not None and self.unet.config.zeros:
            said = [bool(text) for text in request.negative_prompt]
            each = request.count // len(said)
            mask = torch.tensor(said, device=self.device).repeat_interleave(each)
            for name, x in uncond.items():
                uncond[name] = x * mask.view(-1, *[1] * (x.ndim - 1))
        for side in filter(None, (cond, uncond)):  # without a second text encoder
            side.setdefault("pooled", side["context"].new_zeros(request.count, 0))
        shape = latent_shape(request, self.size, 4, self.factor)
        size = shape[2] * self.factor, shape[3] * self.factor
        return self.with_ids((cond, uncond), size, (0, 0), size)

    def with_ids(
        self,
        told: tuple[Conditioning, Conditioning | None],
        original: tuple[int, int],
        crop: tuple[int, int],
        target: tuple[int, int],
        scores: tuple[float, float] = (6.0, 2.5),
    ) -> tuple[Conditioning, Conditioning | None]:
        """Add what SDXL hears of sizes, (height, width), and of the crop, (top, left).

        scores: of beauty, which a refiner hears in place of the target: of the prompt's
        half of guidance, and of the negative one.
        """

        def ids(found: Conditioning, score: float) -> Conditioning:
            end = (score,) if self.is_refiner() else target
            row = torch.tensor([*original, *crop, *end], device=self.device)
            return found | {"ids": row.float().expand(len(found["context"]), -1)}

        cond, uncond = told
        return ids(cond, scores[0]), uncond and ids(uncond, scores[1])
