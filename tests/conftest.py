"""Every test runs offline, on one thread, from the same seed."""

import os
import signal
import threading

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

import random  # noqa: E402

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """A test may draw random numbers, and draws the same ones alone and in company."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)

if threading.current_thread() is threading.main_thread():
    # Jobs that a shell puts into the background ignore Ctrl-C, and so would the processes that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
