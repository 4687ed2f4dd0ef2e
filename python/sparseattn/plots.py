"""The demo's picture: where some heads' attention is, and which keys their patterns visit."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

PIXELS = 256


@dataclass
class HeadPicture:
    """One head: two images [rows, columns] in [0, 1], query positions down, key positions right."""

    title: str
    attention: Tensor
    pattern: Tensor


def _pixels(values: Tensor) -> Tensor:
    """[rows, kv_len] as fp32 [rows, PIXELS, keys of a pixel] on the CPU, zeros at the end."""
    rows, kv_len = values.shape
    width = -(-kv_len // PIXELS)
    padded = torch.nn.functional.pad(values.float(), (0, width * PIXELS - kv_len))
    return padded.view(rows, PIXELS, width).cpu()


def pattern_image(visited: Tensor) -> Tensor:
    """bool [rows, kv_len] as shades: the root of the share of a pixel's keys that are visited, so
    that single columns show without looking like whole blocks."""
    return _pixels(visited).mean(-1).sqrt()


def attention_image(attention: Tensor) -> Tensor:
    """Weights [rows, kv_len] as log shades: a pixel's largest, five decades below its row's."""
    largest = _pixels(attention).amax(-1)
    share = largest / largest.amax(-1, keepdim=True)
    return 1 + share.clamp(min=1e-5).log10() / 5


def save(pictures: list[HeadPicture], caption: str, path: str | PathLike[str]) -> None:
    """Writes a PNG: attention above, pattern below, one column of images per head."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.7 * len(pictures), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(pictures), squeeze=False)
    for column, picture in enumerate(pictures):
        for row, (image, colors) in enumerate(
            ((picture.attention, "magma"), (picture.pattern, "Blues"))
        ):
            axis = axes[row][column]
            axis.imshow(
                image.numpy(), cmap=colors, vmin=0, vmax=1, aspect="auto", interpolation="nearest"
            )
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0][column].set_title(picture.title, fontsize=8)
        axes[1][column].set_xlabel("key position", fontsize=8)
    axes[0][0].set_ylabel("attention (log)\nquery position", fontsize=8)
    axes[1][0].set_ylabel("keys visited\nquery position", fontsize=8)
    figure.suptitle(caption, fontsize=9)
    figure.savefig(path, dpi=130)
