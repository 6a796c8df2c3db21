"""examples -> weights: one loop that teaches all three networks. Chapter 09.
Exported from book/09_training.ipynb by `make export`; edit it there.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sdlearn.disk import write_files


class Task(nn.Module):
    """What one network learns: weights, examples, loss.

    Everything random comes from the generators of the examples.
    """

    def examples(self, rngs: Sequence[random.Random]) -> dict[str, Tensor]:
        """A batch of fresh examples, each drawn with a generator of its own."""
        raise NotImplementedError

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of a batch, named; the one called "loss" is minimised."""
        raise NotImplementedError

    def preview(self) -> Tensor:
        """A few pictures (B, 3, H, W) in [-1, 1] that show how far the training is."""
        raise NotImplementedError


class Average:
    """An exponential moving average of the trained weights.

    Song & Ermon 2020 (arXiv:2006.09011), technique 5.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {
            name: p.detach().clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        # early on, forget the random start quickly
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, new = zip(
            *(
                (self.weights[n], p.detach())
                for n, p in model.named_parameters()
                if p.requires_grad
            ),
            strict=True,
        )
        torch._foreach_lerp_(list(mine), list(new), 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights with the averages; call it again to return."""
        for name, parameter in model.named_parameters():
            if name in self.weights:
                kept = parameter.detach().clone()
                parameter.copy_(self.weights[name])
                self.weights[name].copy_(kept)


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Everything that changes the result is here, so that a resumed run equals an unbroken
    one.
    """

    steps: int
    batch: int
    lr: float = 1e-3
    warmup: int = 200  # steps in which the learning rate rises from 0
    cooldown: int = 0  # last steps, in which it falls to 0 again
    decay: float = 0.01  # AdamW's weight decay
    # the averaged weights forget with a time constant of 1 / (1 - ema) steps
    ema: float = 0.999
    clip: float = 1.0  # largest norm of the gradient
    precision: str = "no"  # "no" (float32), "bf16" or "fp16"
    seed: int = 0
    begun: int = 0  # AdamW began here without memories: the warm-up counts from it

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: a training run needs at least 1"
                )
        if not 0 <= self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}: give a finite learning rate, 0 or more")
        if not 0 <= self.ema < 1:
            raise ValueError(
                f"ema is {self.ema}: give a number from 0 (no averaging) to below 1"
            )
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(
                f"precision {self.precision!r} is unknown: use no, bf16 or fp16"
            )

    def rate(self, step: int) -> float:
        """The learning rate at a step, counted from 0."""
        up = min(1.0, (step + 1 - self.begun) / max(self.warmup, 1))
        down = min(1.0, (self.steps - step) / self.cooldown) if self.cooldown else 1.0
        return self.lr * up * down


def generators(recipe: Recipe, step: int) -> list[random.Random]:
    """One random generator for each example of a step.

    What a step sees follows from its number, and nothing else.
    """
    return [random.Random(f"{recipe.seed} {step} {i}") for i in range(recipe.batch)]


def attention_kernels(device: torch.device) -> list:
    """Which form of attention to train with.

    On a CPU the plain one has the faster backward pass.
    """
    from torch.nn.attention import SDPBackend

    if device.type == "cpu":
        return [SDPBackend.MATH]
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def save_state(
    path: Path,
    done: int,
    recipe: Recipe,
    task: Task,
    optimizer: torch.optim.Optimizer,
    average: Average,
) -> None:
    """All that a run needs to go on: weights, AdamW's memories, averages, steps."""
    state = {
        "step": done,
        "recipe": asdict(recipe),
        "average": average.weights,
        "optimizer": optimizer.state_dict(),
        "weights": {
            n: p.detach() for n, p in task.named_parameters() if p.requires_grad
        },
    }
    write_files({path: lambda part: torch.save(state, part)})


def train(
    task: Task,
    recipe: Recipe,
    folder: Path,
    *,
    log_every: int = 50,
    save_every: int = 500,
    save_minutes: float = 5,
    preview_every: int = 0,
    tick: Callable[[int, dict[str, Tensor]], None] = lambda step, losses: None,
    report: Callable[[int, dict[str, float]], None] = lambda step, scalars: None,
    show: Callable[[int, Tensor], None] = lambda step, pictures: None,
) -> None:
    """Teach a task until recipe.steps; an interrupted run goes on to the same weights.

    What it needs for that is saved in `folder`/state.pt, after `save_every` steps or
    `save_minutes`. `tick` is called after each step, `report` after `log_every` steps,
    `show` with previews. Several processes share the batch, and learn what one would.
    At the end the task holds the averaged weights.
    """
    import accelerate
    from torch.nn.attention import sdpa_kernel

    # else the first run would fix the precision of all later ones
    accelerate.state.AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(
        mixed_precision=recipe.precision, log_with="tensorboard", project_dir=folder
    )
    rank, world = accelerator.process_index, accelerator.num_processes
    if recipe.batch % world:
        raise ValueError(
            f"a batch of {recipe.batch} does not divide among {world} processes: "
            "choose a multiple"
        )
    share = recipe.batch // world
    learned = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        learned, lr=recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.decay, fused=True
    )
    average = Average(task.to(accelerator.device), recipe.ema)
    first = resume(folder / "state.pt", task, optimizer, average, recipe)
    model, optimizer = accelerator.prepare(task, optimizer)
    accelerator.init_trackers("tensorboard")
    told, since = first, time.perf_counter()
    saved = since
    for step in range(first, recipe.steps):
        batch = task.examples(
            generators(recipe, step)[rank * share : (rank + 1) * share]
        )
        batch = {name: x.to(accelerator.device) for name, x in batch.items()}
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        with sdpa_kernel(attention_kernels(accelerator.device)), accelerator.autocast():
            losses = model(batch)
        accelerator.backward(losses["loss"])
        norm = accelerator.clip_grad_norm_(learned, recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(task, step)
        done = step + 1
        tick(done, losses)
        if done % log_every == 0:
            scalars = {name: x.item() for name, x in losses.items()} | {
                "norm": float(norm),
                "lr": recipe.rate(step),
            }
            count, now = recipe.batch * (done - told), time.perf_counter()
            scalars["examples_per_second"] = count / (now - since)
            told, since = done, now
            accelerator.log(scalars, step=done)
            report(done, scalars)
        late = time.perf_counter() - saved > 60 * save_minutes
        due = done % save_every == 0 or done == recipe.steps or late
        if accelerator.is_main_process and due:
            save_state(folder / "state.pt", done, recipe, task, optimizer, average)
            saved = time.perf_counter()
        if accelerator.is_main_process and preview_every and done % preview_every == 0:
            average.swap(task)
            pictures = task.preview().clamp(-1, 1)
            accelerator.get_tracker("tensorboard").writer.add_images(
                "preview", (pictures + 1) / 2, done
            )
            show(done, pictures)
            average.swap(task)
    accelerator.end_training()
    average.swap(task)


def read_state(path: Path) -> dict:
    """A saved state, on the CPU; nothing in the file is ever executed."""
    if not path.exists():
        raise ValueError(
            f"{path} is not there: train that stage first "
            f"(sdlearn train {path.parent.name})"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {
            name: state[name]
            for name in ("step", "recipe", "average", "optimizer", "weights")
        }
    except Exception as error:  # damaged bytes fail in many ways
        raise ValueError(
            f"{path} is not a readable training state ({type(error).__name__}): "
            "remove it"
        ) from None


def resume(
    path: Path,
    task: Task,
    optimizer: torch.optim.Optimizer,
    average: Average,
    recipe: Recipe,
) -> int:
    """Put a saved state back, if there is one; returns the number of steps done."""
    if not path.exists():
        return 0
    state = read_state(path)
    free = {"steps", "cooldown"}  # a run may be made longer, and end gently
    # weights of a checkpoint, with which a new run begins: any precision will do
    if not state["optimizer"]:
        free.add("precision")
    changed = {
        name
        for name, value in asdict(recipe).items()
        if value != state["recipe"].get(name)
    } - free
    if changed:
        raise ValueError(
            f"{path} was made with another {', '.join(sorted(changed))}: "
            "use the same recipe or another folder"
        )
    here, there = (
        {n: x.shape for n, x in weights.items()}
        for weights in (average.weights, state["average"])
    )
    if here != there and (state["optimizer"] or not there.items() <= here.items()):
        raise ValueError(
            f"{path} was made by another network: use the same sizes or another folder"
        )
    task.load_state_dict(state["weights"], strict=False)
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
    for name, value in state["average"].items():
        average.weights[name].copy_(value)
    return state["step"]


def averaged_weights(path: Path) -> dict[str, Tensor]:
    """The averaged weights in a saved state."""
    return read_state(path)["average"]


def progress(path: Path) -> tuple[int, dict]:
    """The steps of a saved state, and its recipe; (0, {}) if there is none."""
    if not path.exists():
        return 0, {}
    state = read_state(path)
    return state["step"], state["recipe"]


def fastest_precision(task: Task, count: int = 8) -> str:
    """The precision in which a training step takes least time here.

    It is measured on a CPU, and known for GPUs.
    """
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if torch.backends.mps.is_available():
        return "no"
    batch, seconds = task.examples([random.Random(i) for i in range(count)]), {}
    for precision in ("no", "bf16"):
        for _ in range(2):  # the first round warms up
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                task(batch)["loss"].backward()
            seconds[precision] = time.perf_counter() - started
    task.zero_grad(set_to_none=True)
    return min(seconds, key=seconds.__getitem__)
