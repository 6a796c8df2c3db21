"""Tensors under names -> a model: every one in its place, converted one at a time, or an error. Chapter 11.
Exported from book/11_weights.ipynb by `make export`; edit it there.
"""

import ctypes
import math
import mmap
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sdlearn.headers import human

__all__ = [
    "fit",
    "check_names",
    "check_shape",
    "check_numbers",
    "free_memory",
    "check_memory",
    "forget",
    "SkipInitialisation",
    "empty",
]


def fit(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    layout: torch.memory_format = torch.preserve_format,
) -> nn.Module:
    """Put tensors under their names into a model on the meta device. Strict: the first misfit is named.

    names: our name -> theirs, for all of the model's tensors. dtype None keeps what the file has. layout: that of
    convolutions, such as torch.channels_last. Tensors of a mapped file stay in it unless they have to change.
    """
    wanted = [
        (ours, names[ours], value.shape) for ours, value in model.state_dict().items()
    ]
    check_names(tensors, [theirs for _, theirs, _ in wanted], source)
    for _, theirs, shape in wanted:
        check_shape(tensors[theirs], theirs, shape, source)
    check_memory(
        sum(
            shape.numel() * (dtype or tensors[theirs].dtype).itemsize
            for _, theirs, shape in wanted
        ),
        device,
        source,
    )
    state = {}
    for ours, theirs, shape in wanted:
        tensor = tensors[theirs].reshape(
            shape
        )  # their 1x1 convolution may be our linear layer
        format = layout if tensor.ndim == 4 else torch.preserve_format
        state[ours] = tensor.to(dtype=dtype or tensor.dtype, memory_format=format)
        check_numbers(tensor, state[ours], theirs, source)
        if (
            getattr(tensors, "mapped", False)
            and state[ours].data_ptr() != tensor.data_ptr()
        ):
            forget(tensors[theirs])
        state[ours] = state[ours].to(device)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def check_names(
    tensors: Mapping[str, Tensor], wanted: Sequence[str], source: str | Path
) -> None:
    """Nothing is missing, and nothing is left over."""
    missing = [name for name in wanted if name not in tensors]
    extra = sorted(tensors.keys() - set(wanted))
    for which, left in {
        "lacks the tensor": missing,
        "has a tensor that no part of the model takes,": extra,
    }.items():
        if left:
            more = f" and {len(left) - 1} more" if left[1:] else ""
            raise ValueError(
                f"{source} {which} {left[0]}{more}: the file belongs to another model, or is damaged"
            )


def check_shape(
    tensor: Tensor, name: str, shape: torch.Size, source: str | Path
) -> None:
    """The right shape, or that of a 1x1 convolution which is a linear layer here; and no whole numbers."""
    same = tensor.shape == shape or (
        tensor.ndim == 4 and tensor.shape == (*shape, 1, 1)
    )
    if not same or not tensor.is_floating_point():
        kind = f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
        raise ValueError(
            f"{source}: {name} is {kind}, but the configuration wants floats in {tuple(shape)}"
        )


def check_numbers(
    tensor: Tensor, converted: Tensor, name: str, source: str | Path
) -> None:
    """No NaN and no infinity, neither from the file nor from the conversion; one look at smallest and largest."""

    def finite(x: Tensor) -> bool:
        x = (
            x.movedim(1, -1) if x.ndim == 4 and not x.is_contiguous() else x
        )  # in memory's own order
        return not x.numel() or all(
            map(math.isfinite, torch.aminmax(x if x.itemsize > 1 else x.float()))
        )

    if not finite(converted):
        if finite(tensor):
            kind = str(converted.dtype).removeprefix("torch.")
            raise ValueError(
                f"{source}: {name} has numbers too large for {kind}: take another --dtype"
            )
        raise ValueError(
            f"{source}: {name} holds NaN or infinite numbers: the file is spoiled, take another copy"
        )


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that are free there; None where nobody can tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return (
        int(found[1]) * 1024 if found and torch.device(device).type == "cpu" else None
    )


def check_memory(need: int, device: torch.device | str, source: str | Path) -> None:
    """Say it before the machine stands still."""
    free = free_memory(device)
    if free is not None and need > free:
        raise ValueError(
            f"{source} needs {human(need)} of memory, but only {human(free)} are free: close other programs, or take "
            "a smaller precision, such as --dtype bf16"
        )


def forget(tensor: Tensor) -> None:
    """Let go of the pages of a mapped file that a tensor lies in; whoever looks again reads them again."""
    if tensor.is_contiguous():
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED
            )


class SkipInitialisation(TorchFunctionMode):
    """Numbers that are overwritten at once need not be drawn; on the meta device that would import half a compiler."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("normal_", "uniform_", "mul"):
            return args[0] if args else kwargs["tensor"]
        function = torch.empty if function is torch.randn else function
        return function(*args, **(kwargs or {}))


def empty(make: Callable[..., nn.Module], *config: object) -> nn.Module:
    """A model without memory behind its tensors: only their shapes."""
    with torch.device("meta"), SkipInitialisation():
        return make(*config)
