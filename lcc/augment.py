"""How training images are varied: each by bits of its own, so that no draw depends on another.

Two ways to draw: `mixed_bits` for what is done to a whole batch at once (shift and flip: a few microseconds
an image), and `seeded` around what timm does to one image (colours, erasing, random resized crops).
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch

from lcc.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    from lcc.data import Preprocessing

PADDING = 4
MASK = (1 << 64) - 1


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


def shift_and_flip(
    pixels: NDArray[np.uint8], bits: NDArray[np.uint64], shift: int, hflip: float
) -> NDArray[np.uint8]:
    """Return every image moved by up to `shift` pixels, black coming in, and flipped with chance `hflip`."""
    if shift:
        height, width = pixels.shape[2:]
        padded = np.zeros((*pixels.shape[:2], height + 2 * shift, width + 2 * shift), dtype=np.uint8)
        padded[:, :, shift:-shift, shift:-shift] = pixels
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
class _Crop:
    crop: Callable[[Image.Image], Image.Image]

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(self.crop(image))).permute(2, 0, 1)


def random_resized_crop(preprocessing: Preprocessing, augment: Augment) -> Callable[[Image.Image], Tensor]:
    """Return timm's random resized crop, from an image to uint8 (3, H, W)."""
    from timm.data.transforms import RandomResizedCropAndInterpolation

    return _Crop(
        RandomResizedCropAndInterpolation(  # type: ignore[no-untyped-call]  # timm
            preprocessing.image_size, scale=augment.crop_scale, interpolation=preprocessing.interpolation
        )
    )


def painter(preprocessing: Preprocessing, augment: Augment) -> Callable[[Tensor], Tensor] | None:
    """Return timm's colour changes and random erasing, on one uint8 (3, H, W); None without any.

    Erasing paints the mean, so its images come out normalised.
    """
    if not (augment.color_jitter or augment.auto_augment or augment.random_erase):
        return None
    from timm.data.transforms_factory import create_transform
    from torchvision.transforms import Compose, ToPILImage

    try:
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
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise RecipeError(f"auto_augment = {augment.auto_augment!r} is none of timm's policies") from error
    transform: Callable[[Tensor], Tensor] = Compose([ToPILImage(), colours, final])
    return transform
