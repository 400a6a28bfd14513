"""Data sets of a few images, written where a test wants them, and a network small enough for them."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Form:
    """What a network wants of its images, as `lcc.models.Preprocessing` says it."""

    mean: tuple[float, ...] = (0.5, 0.4, 0.3)
    std: tuple[float, ...] = (0.2, 0.25, 0.3)
    image_size: tuple[int, int] = (8, 8)
    crop_pct: float = 1.0
    interpolation: str = "bilinear"


def write_idx(path: Path, numbers: np.ndarray) -> None:
    """Write bytes in MNIST's format, gzipped if the name says so."""
    header = bytes([0, 0, 8, numbers.ndim]) + struct.pack(f">{numbers.ndim}I", *numbers.shape)
    data = header + numbers.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def idx_data(folder: Path, train: int = 48, test: int = 12, classes: int = 3, side: int = 8) -> str:
    """Write an IDX data set whose classes differ in brightness, and return its name."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % classes
        images = labels[:, None, None] * 60 + generator.integers(0, 60, (count, side, side))
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels)
    return f"idx:{folder}"


def image_folder(folder: Path, parts: dict[str, dict[str, int]], side: int = 8) -> str:
    """Write PNG files, {part: {class: count}}, and return the data set's name."""
    generator = np.random.default_rng(0)
    for part, classes in parts.items():
        for name, count in classes.items():
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (side, side, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.png")
    return f"imagefolder:{folder}"


def tiny_network(classes: int = 3, *, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """Return a classifier with BatchNorm and, if wanted, something that draws random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(24, classes),
        )
