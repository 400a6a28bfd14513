"""Batches of a data split: decoded once where small, varied as a pure function of (seed, epoch, image).

Nothing here depends on the number of workers or on what was drawn before, so training can stop after any
step and go on from there. Three rules make that so: the order of an epoch is a function of (seed, epoch);
what happens to an image is a function of (seed, epoch, index); the caller's generators stay as they were.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lcc import progress
from lcc.augment import PADDING, Augment, mixed_bits, painter, random_resized_crop, seeded, shift_and_flip
from lcc.data import Normaliser, pixels_transform
from lcc.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    from lcc.data import Preprocessing, Split
    from lcc.readers import Images

SMALL_SIDE = 64
CACHE_BYTES = 2 * 1024**3
MAX_WORKERS = 8
Raw = tuple["NDArray[np.uint8]", "NDArray[np.int64]"]  # images (N, 3, H, W) and labels (N,)


class Training(Augment, Protocol):
    """What a training stream is made by: the part of `lcc.recipe.Finetune` that is used here."""

    @property
    def batch_size(self) -> int:
        """Images in a batch."""

    @property
    def epochs(self) -> int:
        """Times every image is shown."""


class Batches:
    """Batches of normalised float32 images (N, 3, H, W) and int64 labels (N,); iterate over `on(device)`."""

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        samples: Samples,
        order: _InOrder | _Shuffled,
        workers: int,
    ) -> None:
        self.split = split
        self.preprocessing = preprocessing
        self.workers = workers
        self._samples = samples
        self._order = order
        self._loader: DataLoader[Any] | None = None

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._order)

    def on(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches on `device`. Raises: DataError: a damaged image."""
        if self._loader is None:
            self._loader = _loader(self._samples, self._order, self.workers, pin=device.type == "cuda")
        normalise = Normaliser(self.preprocessing, device)
        for batch in self._loader:
            if isinstance(batch, DataError):
                raise batch
            images, labels = (part.to(device, non_blocking=True) for part in batch)
            yield normalise(images) if images.dtype == torch.uint8 else images, labels


def eval_batches(
    split: Split, preprocessing: Preprocessing, *, batch_size: int = 256, workers: int | None = None
) -> Batches:
    """Return the split in order, under the evaluation transform.

    `workers` None: none for images decoded once and kept, else one per core.
    Raises: DataError: a damaged image.
    """
    base = pixels_transform(preprocessing)
    kept = _worth_keeping(split, preprocessing)
    samples = Samples(
        _Kept(split.images, base, preprocessing.image_size) if kept else _Decoded(split.images, base)
    )
    order = _InOrder(len(split), batch_size)
    return Batches(split, preprocessing, samples, order, _workers(workers, light=kept))


def train_batches(
    split: Split,
    preprocessing: Preprocessing,
    options: Training,
    *,
    start: int = 0,
    workers: int | None = None,
) -> Batches:
    """Return the shuffled, varied batches of all epochs in one stream, from step `start` on.

    Every epoch has the same number of full batches; the few images left over differ from epoch to epoch.
    Raises: DataError: fewer images than one batch, a damaged image.
    """
    if len(split) < options.batch_size:
        raise DataError(
            f"{split.text}: {len(split)} training images are fewer than one batch of {options.batch_size}"
        )
    small = max(preprocessing.image_size) <= SMALL_SIDE
    crop = options.crop if options.crop != "auto" else ("pad" if small else "resize")
    kept = crop != "resize" and _worth_keeping(split, preprocessing)
    source: _Kept | _Decoded
    if crop == "resize":
        source = _Decoded(split.images, random_resized_crop(preprocessing, options), options.seed)
    else:
        base = pixels_transform(preprocessing, crop_pct=1.0)
        source = _Kept(split.images, base, preprocessing.image_size) if kept else _Decoded(split.images, base)
    samples = Samples(
        source,
        shift=PADDING if crop == "pad" else 0,
        hflip=options.hflip,
        paint=painter(preprocessing, options),
        seed=options.seed,
    )
    order = _Shuffled(len(split), options.batch_size, options.seed, options.epochs, start)
    light = kept and samples.paint is None
    return Batches(split, preprocessing, samples, order, _workers(workers, light=light))


class _Kept:
    """Images decoded once and kept, uint8 (N, 3, H, W)."""

    def __init__(self, images: Images, base: Callable[[Image.Image], Tensor], size: tuple[int, int]) -> None:
        self.pixels = np.empty((len(images), 3, *size), dtype=np.uint8)
        self.labels = np.empty(len(images), dtype=np.int64)
        with progress.bar("read images", len(images)) as tick:
            for index in range(len(images)):
                image, self.labels[index] = images[index]
                self.pixels[index] = base(image).numpy()
                tick(index)

    def __call__(self, _epoch: int, indices: NDArray[np.int64]) -> Raw:
        return self.pixels[indices], self.labels[indices]


@dataclass(frozen=True)
class _Decoded:
    """Images decoded every time; with a seed, `base` is random."""

    images: Images
    base: Callable[[Image.Image], Tensor]
    seed: int | None = None

    def __call__(self, epoch: int, indices: NDArray[np.int64]) -> Raw:
        pixels, labels = [], []
        seeds = mixed_bits(self.seed or 0, epoch, indices)
        for index, seed in zip(indices.tolist(), seeds.tolist(), strict=True):
            image, label = self.images[index]
            if self.seed is None:
                pixels.append(self.base(image).numpy())
            else:
                with seeded(seed):
                    pixels.append(self.base(image).numpy())
            labels.append(label)
        return np.stack(pixels), np.array(labels, dtype=np.int64)


@dataclass(frozen=True)
class Samples(Dataset[Any]):
    """Turns (epoch, indices) into a batch: images from the source, shifted, flipped, `paint` on each."""

    source: _Kept | _Decoded = field(repr=False)
    shift: int = 0
    hflip: float = 0.0
    paint: Callable[[Tensor], Tensor] | None = None
    seed: int = 0

    def __getitem__(self, draw: tuple[int, NDArray[np.int64]]) -> tuple[Tensor, Tensor] | DataError:
        """Return images, uint8 or normalised float32, and labels; or the error, to cross processes."""
        epoch, indices = draw
        try:
            pixels, labels = self.source(epoch, indices)
        except DataError as error:
            return error
        bits = mixed_bits(self.seed, epoch, indices)
        images = torch.from_numpy(shift_and_flip(pixels, bits, self.shift, self.hflip))
        if self.paint is not None:
            seeds = bits.tolist()
            images = torch.stack([self._vary(image, seed) for image, seed in zip(images, seeds, strict=True)])
        return images, torch.from_numpy(labels)

    def _vary(self, image: Tensor, seed: int) -> Tensor:
        assert self.paint is not None  # narrows the type
        with seeded(seed ^ 0x5DEECE66D):  # another stream than the crop's
            return self.paint(image)


@dataclass(frozen=True)
class _InOrder(Sampler[Any]):
    images: int
    batch_size: int

    def __len__(self) -> int:
        return math.ceil(self.images / self.batch_size)

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        for first in range(0, self.images, self.batch_size):
            yield 0, np.arange(first, min(first + self.batch_size, self.images))


@dataclass(frozen=True)
class _Shuffled(Sampler[Any]):
    images: int
    batch_size: int
    seed: int
    epochs: int
    start: int = 0

    def __len__(self) -> int:
        return self.epochs * (self.images // self.batch_size) - self.start

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        first, done = divmod(self.start, self.images // self.batch_size)
        for epoch in range(first, self.epochs):
            order = np.random.default_rng((self.seed, 2, epoch)).permutation(self.images)
            for step in range(done, self.images // self.batch_size):
                yield epoch, order[step * self.batch_size : (step + 1) * self.batch_size]
            done = 0


def _worth_keeping(split: Split, preprocessing: Preprocessing) -> bool:
    height, width = preprocessing.image_size
    return max(height, width) <= SMALL_SIDE and len(split) * 3 * height * width <= CACHE_BYTES


def _workers(asked: int | None, *, light: bool) -> int:
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return 0 if light else min(MAX_WORKERS, cores)


def _itself(batch: object) -> object:
    return batch


def _ignore_interrupts(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides


def _loader(samples: Samples, order: _InOrder | _Shuffled, workers: int, *, pin: bool) -> DataLoader[Any]:
    if workers == 0:
        return DataLoader(samples, batch_size=None, sampler=order, collate_fn=_itself, pin_memory=pin)
    # A fork would copy a process that already runs threads (progress bar, OpenMP, CUDA).
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["lcc.batches"])
    return DataLoader(
        samples,
        batch_size=None,
        sampler=order,
        collate_fn=_itself,
        pin_memory=pin,
        num_workers=workers,
        prefetch_factor=4,
        persistent_workers=True,
        worker_init_fn=_ignore_interrupts,
        multiprocessing_context=context,
    )
