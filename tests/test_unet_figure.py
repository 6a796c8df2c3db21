"""The figure of a U-Net says what the network does: sums of channels, one arc for each skip, boxes to scale."""

import re

import pytest
import torch

from sdlearn.book.unet_figure import PURPLE, draw_unet, layout
from sdlearn.tiny.recipe import UNET_SIZES
from sdlearn.unet import UNet, UNetConfig


def traced(config, side):
    """(name, part, channels in, out, side in, out) of every part, as chapter 07 notes them."""
    rows = []
    with torch.device("meta"):
        unet = UNet(config)
        for name, part in unet.named_modules():
            if re.fullmatch(r"conv_in|(down|up)\.\d+|middle|conv_out", name):
                part.register_forward_hook(
                    lambda part, inputs, y, name=name: rows.append(
                        (name, part, inputs[0].shape[1], y.shape[1], inputs[0].shape[-1], y.shape[-1])
                    )
                )
        unet(torch.empty(1, 4, side, side), torch.empty(1), torch.empty(1, 77, config.context_width))
    return rows


def test_the_sums_are_those_of_the_network():
    sums = layout(traced(UNetConfig(), 64))[1]
    assert sums[3] == ["1280+1280"] * 3 and sums[2] == ["1280+1280", "1280+1280", "1280+640"]
    assert sums[1] == ["1280+640", "640+640", "640+320"] and sums[0] == ["640+320", "320+320", "320+320"]
    assert layout(traced(UNET_SIZES, 16))[1] == {0: ["192+96", "96+96"], 1: ["224+192", "192+96"],
                                                 2: ["224+224", "224+192"]}  # fmt: skip


def test_one_arc_for_each_skip_and_boxes_to_scale():
    for config, side, skips in ((UNetConfig(), 64, 12), (UNET_SIZES, 16, 6)):
        html = draw_unet(traced(config, side), "A U-Net", zoom=2, wide=0.1).data
        assert html.count(f'stroke="{PURPLE}"') == skips
        boxes = re.findall(r"<title>([^<]*)</title><rect [^>]*width=\"([\d.]+)\" height=\"([\d.]+)\"", html)
        for hint, width, height in boxes:
            channels, rows, _ = map(int, hint.split(" → ")[1].split("×"))
            assert float(height) == 2 * rows
            if hint.startswith("middle"):
                assert float(width) == pytest.approx(0.1 * channels, abs=0.06)
        assert sum(hint.startswith("middle") for hint, *_ in boxes) == 3
        assert f"latents 4×{side}×{side}" in html and f"noise 4×{side}×{side}" in html
