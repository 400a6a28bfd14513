"""Batches of training images: the same however they are made, and what augmentation does to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_data import Form, image_folder
from training_process import CPU, options

from lcc.batches import train_batches
from lcc.data import open_split
from lcc.errors import DataError

pytestmark = pytest.mark.usefixtures("one_thread")


def stream(text, start=0, workers=0, epochs=2, **changes):
    split = open_split(text, "train")
    batches = train_batches(
        split, Form(), options(text, epochs=epochs, **changes), start=start, workers=workers
    )
    return list(batches.on(CPU))


def same(one, two):
    return len(one) == len(two) and all(
        torch.equal(a, b)
        for left, right in zip(one, two, strict=True)
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize(
    "changes", [{}, {"crop": "resize"}, {"auto_augment": "rand-m5", "random_erase": 0.5}]
)
def test_a_stream_begun_later_is_the_end_of_the_whole_one(data, changes):
    whole = stream(data, **changes)
    assert len(whole) == 12
    assert same(stream(data, start=7, **changes), whole[7:])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on one core
def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    text = image_folder(tmp_path, {"train": {"a": 24, "b": 24}})
    changes = {"crop": "resize", "auto_augment": "rand-m5", "random_erase": 0.5}
    assert same(stream(text, **changes), stream(text, workers=2, **changes))


def test_every_epoch_shows_every_image_once_in_another_order(data):
    batches = stream(data, crop="none", hflip=0.0)
    plain = open_split(data, "train")
    pixels = torch.stack([torch.from_numpy(np.array(plain.images[i][0])) for i in range(48)]).permute(
        0, 3, 1, 2
    )
    expected = {tuple(image.flatten().tolist()) for image in pixels}
    shape = (1, 3, 1, 1)
    epochs = []
    for half in (batches[:6], batches[6:]):
        images = torch.cat([x for x, _ in half])
        images = (images * torch.tensor(Form().std).view(shape) + torch.tensor(Form().mean).view(shape)) * 255
        epochs.append([tuple(image.round().int().flatten().tolist()) for image in images])
    assert set(epochs[0]) == set(epochs[1]) == expected
    assert epochs[0] != epochs[1]


def test_a_shifted_crop_moves_the_image_by_up_to_four_pixels_and_flips_half(tmp_path):
    import lcc.augment as b

    pixels = np.arange(1, 65, dtype=np.uint8).reshape(1, 1, 8, 8).repeat(3, axis=1)
    padded = np.pad(pixels[0], ((0, 0), (4, 4), (4, 4)))
    windows = {
        padded[:, y : y + 8, x : x + 8][:, :, ::step].tobytes(): (y, x, step)
        for y in range(9)
        for x in range(9)
        for step in (1, -1)
    }
    count = 4000
    bits = b.mixed_bits(0, 0, np.arange(count))
    moved = b.shift_and_flip(pixels.repeat(count, axis=0), bits, 4, 0.5)
    seen = [windows[image.tobytes()] for image in moved]
    assert len(set(seen)) == 9 * 9 * 2
    assert abs(sum(step == -1 for _, _, step in seen) / count - 0.5) < 0.03


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_met_while_training_is_named_by_its_path(tmp_path, workers):
    text = image_folder(tmp_path, {"train": {"a": 8}})
    (tmp_path / "train" / "a" / "3.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"^\S*train/a/3\.png: damaged image"):
        stream(text, workers=workers, crop="resize")
