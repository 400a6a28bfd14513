"""Data sets by name, as labelled RGB images in a fixed order.

| text | what |
|---|---|
| imagefolder:DIR | DIR/train/CLASS/*.jpg and DIR/val/ or DIR/test/; or DIR/CLASS/*.jpg, which is every part |
| the same, without labels | DIR/train/*.jpg or DIR/*.jpg, too, where no labels are needed |
| idx:DIR | MNIST's files (train-images-idx3-ubyte, t10k-..., also gzipped); grey becomes RGB |
| cifar10:DIR, cifar100:DIR, stl10:DIR | the folders torchvision unpacks; nothing is downloaded |
| hfds/NAME, torch/NAME:DIR, ... | what timm's `create_dataset` reads; hfds/ may use the network |
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset

from lcc.errors import DataError, one_line
from lcc.readers import Array, Files, Subset, TimmReader, read_idx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    from lcc.readers import Images

Part = Literal["train", "val", "test"]
ALL = "all of it"  # the name of a part that is every part
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
FORMS = "imagefolder:DIR, idx:DIR, cifar10:DIR, cifar100:DIR, stl10:DIR, or a timm reader such as hfds/NAME"


class Preprocessing(Protocol):
    """How a network wants its images: the part of `lcc.models.Preprocessing` that is used here."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, for pixels in [0, 1]."""

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, for pixels in [0, 1]."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""

    @property
    def crop_pct(self) -> float:
        """Share of the resized image's side that the centre crop keeps."""

    @property
    def interpolation(self) -> str:
        """Timm's name of the resize filter."""


@dataclass(frozen=True)
class Split:
    """One part of a data set. `name` says which for people; `labels` only where they cost nothing to know."""

    text: str
    name: str
    images: Images
    labels: NDArray[np.int64] | None = field(repr=False)
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int | None:
        """How many classes there are, where known without reading the images."""
        if self.class_names is not None:
            return len(self.class_names)
        return None if self.labels is None else int(self.labels.max()) + 1

    @property
    def fingerprint(self) -> str:
        """A short hash of the number of images and their labels."""
        labels = b"" if self.labels is None else self.labels.tobytes()
        return hashlib.sha256(f"{len(self)};".encode() + labels).hexdigest()[:16]

    def subset(self, indices: NDArray[np.int64], name: str) -> Split:
        """Return the images with these indices, in this order."""
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, name=name, images=Subset(self.images, indices), labels=labels)


def open_split(text: str, part: Part) -> Split:
    """Return one part of the data set that `text` names.

    Raises: DataError: not a name this knows, a missing folder or file, a class without images.
    """
    scheme, colon, rest = text.partition(":")
    if colon and scheme in _OPENERS:
        root = Path(rest).expanduser()
        if not root.is_dir():
            raise DataError(f"{text}: no such folder as {rest!r}")
        return _OPENERS[scheme](text, root, part)
    if "/" in scheme:
        return _timm_reader(text, scheme, rest, part)
    raise DataError(f"{text!r} names no data set; write {FORMS}")


def open_train(text: str, *, val_split: float = 0.0, seed: int = 0) -> Split:
    """Return the training part, without the share `val_split` that `open_eval` takes for evaluation."""
    return open_split(text, "train") if val_split == 0 else _carve(text, val_split, seed)[0]


def open_eval(text: str, *, val_split: float = 0.0, seed: int = 0) -> Split:
    """Return what to evaluate on: the share `val_split` of train, else val, else test."""
    if val_split > 0:
        return _carve(text, val_split, seed)[1]
    try:
        return open_split(text, "val")
    except _NoSuchPartError:
        return open_split(text, "test")


def open_parts(text: str, *, val_split: float = 0.0, seed: int = 0) -> tuple[Split, Split]:
    """Return what to train and what to evaluate on.

    Raises: DataError: they are the same images, or their labels mean different things; as `open_split`.
    """
    train = open_train(text, val_split=val_split, seed=seed)
    advice = "hold some images out: --val-split 0.1 (a recipe: finetune.val_split)"
    try:
        held_out = open_eval(text, val_split=val_split, seed=seed)
    except _NoSuchPartError as error:
        raise DataError(f"{error}; {advice}") from error
    if held_out.name == ALL:
        raise DataError(
            f"{text}: has neither val/ nor test/, so it would be evaluated on what it is trained on; {advice}"
        )
    one, two = train.class_names, held_out.class_names
    if one is not None and two is not None and one != two:
        name = min(set(one) ^ set(two))
        missing = held_out if name in one else train
        raise DataError(
            f"{train.text}: class {name!r} is missing from {missing.name}; both parts need the same"
        )
    return train, held_out


def enough_images(text: str, count: int) -> Split:
    """Return the training part, without need of labels. Raises: DataError: fewer than `count` images."""
    split = _loose_images(text) or open_split(text, "train")
    if len(split) < count:
        raise DataError(
            f"{text}: has {len(split)} training images, {count} were asked for; take fewer: --images "
            f"{len(split)} (a recipe: calibrate.images)"
        )
    return split


def images(text: str, preprocessing: Preprocessing, count: int, seed: int = 0) -> Tensor:
    """Return (count, 3, H, W) normalised training images for calibration; a seeded choice, without labels.

    Raises: DataError: fewer than `count` images.
    """
    split = enough_images(text, count)
    transform = pixels_transform(preprocessing)
    chosen = np.random.default_rng(seed).permutation(len(split))[:count]
    pixels = torch.stack([transform(split.images[int(index)][0]) for index in chosen])
    return Normaliser(preprocessing, pixels.device)(pixels)


def state_of_images(text: str, count: int, seed: int = 0) -> str:
    """Return a hash that changes with what `images` returns, without opening a file.

    By the number of images and their labels, and of those chosen: the pixels of what is in memory; the name,
    size and time of change of a file; nothing of what timm reads.
    """
    split = enough_images(text, count)
    state = hashlib.sha256(split.fingerprint.encode())
    for index in np.random.default_rng(seed).permutation(len(split))[:count]:
        state.update(split.images.state(int(index)))
    return state.hexdigest()[:16]


def pixels_transform(
    preprocessing: Preprocessing, *, crop_pct: float | None = None
) -> Callable[[Image.Image], Tensor]:
    """Return timm's evaluation transform up to uint8 (3, H, W): resize, centre crop."""
    from timm.data.transforms_factory import create_transform

    transform = create_transform(
        (3, *preprocessing.image_size),
        is_training=False,
        crop_pct=crop_pct or preprocessing.crop_pct,
        interpolation=preprocessing.interpolation,
        normalize=False,
    )
    return _Pixels(preprocessing.image_size, crop_pct or preprocessing.crop_pct, transform)


class Normaliser:
    """Turns uint8 images (N, 3, H, W) on `device` into float32 with mean 0 and deviation 1 over the data."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self.mean = torch.tensor(preprocessing.mean, device=device).mul_(255).view(1, -1, 1, 1)
        self.std = torch.tensor(preprocessing.std, device=device).mul_(255).view(1, -1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the same images, normalised."""
        return pixels.float().sub_(self.mean).div_(self.std)


@dataclass(frozen=True)
class _Pixels:
    size: tuple[int, int]
    crop_pct: float
    transform: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        if self.crop_pct == 1 and image.size == self.size[::-1]:  # the transform would change nothing
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return self.transform(image)


class _NoSuchPartError(DataError):
    """The data set has no such part."""


def _carve(text: str, val_split: float, seed: int) -> tuple[Split, Split]:
    split = open_split(text, "train")
    held_out = max(1, round(val_split * len(split)))
    if held_out >= len(split):
        raise DataError(f"{text}: {len(split)} training images leave nothing at val_split = {val_split}")
    order = np.random.default_rng((seed, 1)).permutation(len(split))
    name = f"val (a {val_split:.3g} share of train)"
    return split.subset(np.sort(order[held_out:]), "train"), split.subset(np.sort(order[:held_out]), name)


def _imagefolder(text: str, root: Path, part: Part) -> Split:
    folder = _folder_of(text, root, part)
    class_names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    if not class_names:
        raise DataError(f"{text}: {folder} has no folders; put each class's images in one of its own")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = _images_among((folder / name).rglob("*"))
        if not found:
            raise DataError(f"{text}: class folder {folder / name} has no images; remove it or fill it")
        paths += found
        labels += [label] * len(found)
    numbers = np.array(labels, dtype=np.int64)
    return Split(text, ALL if folder == root else part, Files(tuple(paths), numbers), numbers, class_names)


def _folder_of(text: str, root: Path, part: Part) -> Path:
    folder = root / part
    if folder.is_dir():
        return folder
    if any((root / name).is_dir() for name in ("train", "val", "test")):
        raise _NoSuchPartError(f"{text}: has no folder {part}/")
    return root


def _images_among(paths: Iterable[Path]) -> list[str]:
    return sorted(str(path) for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)


def _loose_images(text: str) -> Split | None:
    """Return the training images of an imagefolder without class folders; None: it is none of these."""
    scheme, _, rest = text.partition(":")
    root = Path(rest).expanduser()
    if scheme != "imagefolder" or not root.is_dir():
        return None
    entries = list(_folder_of(text, root, "train").iterdir())
    found = _images_among(entries)
    if not found or any(entry.is_dir() for entry in entries):
        return None
    return Split(text, "train", Files(tuple(found), np.zeros(len(found), dtype=np.int64)), None)


_IDX_PARTS: dict[Part, str] = {"train": "train", "val": "val", "test": "(?:t10k|test)"}


def _idx(text: str, root: Path, part: Part) -> Split:
    pixels = read_idx(_idx_file(text, root, part, "images"))
    labels = read_idx(_idx_file(text, root, part, "labels")).astype(np.int64)
    if pixels.ndim not in {3, 4} or labels.ndim != 1 or len(pixels) != len(labels):
        raise DataError(
            f"{text}: {part} images of shape {pixels.shape} and labels of {labels.shape} don't fit"
        )
    return Split(text, part, Array(pixels, labels), labels)


def _idx_file(text: str, root: Path, part: Part, what: str) -> Path:
    pattern = re.compile(rf"{_IDX_PARTS[part]}[-_.]{what}.*ubyte(\.gz)?")
    found = sorted(path for path in root.iterdir() if pattern.fullmatch(path.name))
    if not found:
        raise _NoSuchPartError(f"{text}: has no file like {part}-{what}-idx?-ubyte or the same with .gz")
    return found[0]


def _torchvision(text: str, root: Path, part: Part) -> Split:
    from torchvision import datasets

    scheme = text.partition(":")[0]
    if part == "val":
        raise _NoSuchPartError(f"{text}: has no val part")
    try:
        if scheme == "stl10":
            stl = datasets.STL10(root, split=part)
            pixels, targets, names = (
                np.ascontiguousarray(stl.data.transpose(0, 2, 3, 1)),
                stl.labels,
                stl.classes,
            )
        else:
            kind = datasets.CIFAR10 if scheme == "cifar10" else datasets.CIFAR100
            cifar = kind(root, train=part == "train")
            pixels, targets, names = cifar.data, cifar.targets, cifar.classes
    except (RuntimeError, OSError) as error:
        raise DataError(f"{text}: not a folder of torchvision's {scheme}: {one_line(error)}") from error
    labels = np.asarray(targets, dtype=np.int64)
    return Split(text, part, Array(pixels, labels), labels, tuple(names))


_OPENERS: dict[str, Callable[[str, Path, Part], Split]] = {
    "imagefolder": _imagefolder,
    "idx": _idx,
    "cifar10": _torchvision,
    "cifar100": _torchvision,
    "stl10": _torchvision,
}


def _timm_reader(text: str, name: str, root: str, part: Part) -> Split:
    from timm.data.dataset_factory import create_dataset

    split = {"train": "train", "val": "validation", "test": "test"}[part]
    try:
        dataset = create_dataset(name, root=root or None, split=split, input_img_mode="RGB", download=False)
    except ModuleNotFoundError as error:
        raise DataError(f"{text}: needs the package {error.name}: pip install {error.name}") from error
    except Exception as error:  # readers wrap other people's libraries, which raise anything
        kind = _NoSuchPartError if part == "val" else DataError
        raise kind(f"{text}: timm can't open its {split} split: {one_line(error)}") from error
    if isinstance(dataset, IterableDataset):
        raise DataError(f"{text}: is a stream without numbered images; use hfds/, torch/ or a folder instead")
    names = getattr(dataset, "classes", None)
    return Split(text, part, TimmReader(text, dataset), None, None if names is None else tuple(names))
