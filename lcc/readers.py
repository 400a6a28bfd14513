"""Images as they lie on disk or in memory, one at a time; a damaged file is named by its path."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from lcc.errors import DataError, one_line

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Images(Protocol):
    """Labelled RGB images in a fixed order."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return image and label. Raises: DataError: the image is damaged."""

    def state(self, index: int) -> bytes:
        """Return what changes with the image, as far as that is known without opening it."""


@dataclass(frozen=True)
class Subset:
    """Some images of others, by their indices."""

    images: Images
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[int(self.indices[index])]

    def state(self, index: int) -> bytes:
        """What the image there has."""
        return self.images.state(int(self.indices[index]))


@dataclass(frozen=True)
class Files:
    """Image files, read every time."""

    paths: tuple[str, ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return _read_image(self.paths[index]), int(self.labels[index])

    def state(self, index: int) -> bytes:
        """Its file's name, size and time of change. Raises: DataError: it is gone."""
        path = Path(self.paths[index])
        try:
            found = path.stat()
        except OSError as error:
            raise DataError(f"{path}: can't be read: {one_line(error)}") from error
        return f"{path.name} {found.st_size} {found.st_mtime_ns}".encode()


@dataclass(frozen=True)
class Array:
    """Images in memory: uint8 (N, H, W) or (N, H, W, 3)."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.labels[index])

    def state(self, index: int) -> bytes:
        """Its pixels."""
        return bytes(self.pixels[index].tobytes())


@dataclass(frozen=True)
class TimmReader:
    """A map-style data set of timm."""

    text: str
    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, label = self.dataset[index]
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{self.text}: image {index} can't be read: {one_line(error)}") from error
        return image.convert("RGB"), int(label)

    def state(self, index: int) -> bytes:
        """Nothing but its number."""
        return str(index).encode()


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Return the numbers in an IDX file of bytes, gzipped or not. Raises: DataError: it is damaged."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged file: {one_line(error)}") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise DataError(f"{path}: not an IDX file of bytes")
    start = 4 + 4 * data[3]
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], dtype=">u4"))
    if len(data) != start + math.prod(shape):
        raise DataError(
            f"{path}: damaged file: {len(data)} bytes, its header says {start + math.prod(shape)}"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


def _read_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: damaged image: {one_line(error)}; replace or remove it") from error
