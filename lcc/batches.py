"""Batches of a data split: decoded once where small, varied as a pure function of (seed, epoch, image).

Nothing here depends on the number of workers or on what was drawn before, so training can stop after any
step and go on from there. Three rules make that so: the order of an epoch is a function of (seed, epoch);
what happens to an image is a function of (seed, epoch, index); the caller's generators stay as they were.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lcc.data import normalise, pixels_transform
from lcc.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    from lcc.data import Images, Preprocessing, Split

SMALL_SIDE = 64
CACHE_BYTES = 2 * 1024**3
PADDING = 4
MAX_WORKERS = 8
MASK = (1 << 64) - 1
Raw = tuple["NDArray[np.uint8]", "NDArray[np.int64]"]  # images (N, 3, H, W) and labels (N,)


class Augment(Protocol):
    """How training images are varied: the part of `lcc.recipe.Finetune` that is used here."""

    @property
    def crop(self) -> Literal["auto", "pad", "resize", "none"]:
        """Shifted by up to `PADDING` pixels, a random resized part, or as it is."""

    @property
    def crop_scale(self) -> tuple[float, float]:
        """Smallest and largest share of the area that a random resized crop takes."""

    @property
    def hflip(self) -> float:
        """Chance of a horizontal flip."""

    @property
    def color_jitter(self) -> float:
        """Strength of timm's colour jitter."""

    @property
    def auto_augment(self) -> str | None:
        """Timm's policy string."""

    @property
    def random_erase(self) -> float:
        """Chance of random erasing."""

    @property
    def seed(self) -> int:
        """Of everything random."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of random, numpy and torch (CPU) for a block, then put them back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def mixed_bits(seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return 64 well-mixed bits for each (seed, epoch, index).

    Source: splitmix64's finaliser, Steele et al., OOPSLA 2014, on a Weyl sequence in each of the three.
    """
    origin = ((seed + 1) * 0x9E3779B97F4A7C15 + (epoch + 1) * 0xD1B54A32D192ED03) & MASK
    bits = indices.astype(np.uint64) * np.uint64(0x8CB92BA72F3D8DD7) + np.uint64(origin)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


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
        for batch in self._loader:
            if isinstance(batch, DataError):
                raise batch
            images, labels = (part.to(device, non_blocking=True) for part in batch)
            yield normalise(images, self.preprocessing) if images.dtype == torch.uint8 else images, labels


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
    augment: Augment,
    *,
    batch_size: int,
    epochs: int,
    start: int = 0,
    workers: int | None = None,
) -> Batches:
    """Return the shuffled, varied batches of all epochs in one stream, from step `start` on.

    Every epoch has the same number of full batches; the few images left over differ from epoch to epoch.
    Raises: DataError: fewer images than one batch, a damaged image.
    """
    if len(split) < batch_size:
        raise DataError(
            f"{split.text}: {len(split)} training images are fewer than one batch of {batch_size}"
        )
    small = max(preprocessing.image_size) <= SMALL_SIDE
    crop = augment.crop if augment.crop != "auto" else ("pad" if small else "resize")
    kept = crop != "resize" and _worth_keeping(split, preprocessing)
    source: _Kept | _Decoded
    if crop == "resize":
        source = _Decoded(split.images, _random_resized_crop(preprocessing, augment), augment.seed)
    else:
        base = pixels_transform(preprocessing, crop_pct=1.0)
        source = _Kept(split.images, base, preprocessing.image_size) if kept else _Decoded(split.images, base)
    samples = Samples(
        source,
        shift=PADDING if crop == "pad" else 0,
        hflip=augment.hflip,
        paint=_paint(preprocessing, augment),
        seed=augment.seed,
    )
    order = _Shuffled(len(split), batch_size, augment.seed, epochs, start)
    light = kept and samples.paint is None
    return Batches(split, preprocessing, samples, order, _workers(workers, light=light))


class _Kept:
    """Images decoded once and kept, uint8 (N, 3, H, W)."""

    def __init__(self, images: Images, base: Callable[[Image.Image], Tensor], size: tuple[int, int]) -> None:
        self.pixels = np.empty((len(images), 3, *size), dtype=np.uint8)
        self.labels = np.empty(len(images), dtype=np.int64)
        for index in range(len(images)):
            image, self.labels[index] = images[index]
            self.pixels[index] = base(image).numpy()

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
        """Return images, uint8 or normalised float32, and labels; or the error, so that it crosses processes."""
        epoch, indices = draw
        try:
            pixels, labels = self.source(epoch, indices)
        except DataError as error:
            return error
        bits = mixed_bits(self.seed, epoch, indices)
        images = torch.from_numpy(_shift_and_flip(pixels, bits, self.shift, self.hflip))
        if self.paint is not None:
            seeds = bits.tolist()
            images = torch.stack([self._vary(image, seed) for image, seed in zip(images, seeds, strict=True)])
        return images, torch.from_numpy(labels)

    def _vary(self, image: Tensor, seed: int) -> Tensor:
        assert self.paint is not None  # narrows the type
        with seeded(seed ^ 0x5DEECE66D):  # another stream than the crop's
            return self.paint(image)


def _shift_and_flip(
    pixels: NDArray[np.uint8], bits: NDArray[np.uint64], shift: int, hflip: float
) -> NDArray[np.uint8]:
    """Return every image moved by up to `shift` pixels, black coming in, and flipped with chance `hflip`."""
    if shift:
        height, width = pixels.shape[2:]
        margin = (shift, shift)
        padded = np.pad(pixels, ((0, 0), (0, 0), margin, margin))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
        places = np.uint64(2 * shift + 1)
        rows, columns = (
            (bits & np.uint64(0xFFFF)) % places,
            (bits >> np.uint64(16) & np.uint64(0xFFFF)) % places,
        )
        pixels = windows[np.arange(len(pixels)), :, rows.astype(np.int64), columns.astype(np.int64)]
    flipped = (bits >> np.uint64(32)).astype(np.float64) < hflip * 2.0**32
    pixels[flipped] = pixels[flipped, :, :, ::-1]
    return pixels


@dataclass(frozen=True)
class _RandomResizedCrop:
    crop: Callable[[Image.Image], Image.Image]

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(self.crop(image))).permute(2, 0, 1)


def _random_resized_crop(preprocessing: Preprocessing, augment: Augment) -> _RandomResizedCrop:
    from timm.data.transforms import RandomResizedCropAndInterpolation

    return _RandomResizedCrop(
        RandomResizedCropAndInterpolation(  # type: ignore[no-untyped-call]  # timm
            preprocessing.image_size, scale=augment.crop_scale, interpolation=preprocessing.interpolation
        )
    )


def _paint(preprocessing: Preprocessing, augment: Augment) -> Callable[[Tensor], Tensor] | None:
    """Return timm's colour changes and random erasing, on one uint8 (3, H, W); None without any.

    Erasing paints the mean, so its images come out normalised.
    """
    if not (augment.color_jitter or augment.auto_augment or augment.random_erase):
        return None
    from timm.data.transforms_factory import create_transform
    from torchvision.transforms import Compose, ToPILImage

    _, colours, final = create_transform(
        (3, *preprocessing.image_size),
        is_training=True,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        re_prob=augment.random_erase,
        normalize=augment.random_erase > 0,
        separate=True,
    )
    transform: Callable[[Tensor], Tensor] = Compose([ToPILImage(), colours, final])
    return transform


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
    return 0 if light else min(MAX_WORKERS, len(os.sched_getaffinity(0)))


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
