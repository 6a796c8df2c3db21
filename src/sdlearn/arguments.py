"""Arguments that several commands share; nothing heavy is imported for them."""

import argparse
import os

__all__ = ["DTYPES", "add_device", "thread_count"]

DTYPES = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}


def add_device(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """--device and --dtype, which has a default."""
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="cuda, mps or cpu (default: the first that is there)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        metavar="TYPE",
        help=f"float32, float16 or bfloat16 ({default or 'default: by device'})",
        default=default,
    )


def thread_count(text: str) -> int:
    """A sensible number of CPU threads: very many would end the process."""
    most = max(64, 4 * (os.cpu_count() or 1))
    if not text.strip().isdecimal() or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"give a whole number from 1 to {most}")
    return int(text)
