from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from small_data import Form, idx_data, image_folder, write_idx

from lcc import data
from lcc.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path


def test_an_imagefolder_gives_its_images_in_the_order_of_their_sorted_names(tmp_path):
    text = image_folder(tmp_path, {"train": {"cat": 2, "ant": 3}, "val": {"ant": 1, "cat": 1}})
    split = data.open_split(text, "train")
    assert split.class_names == ("ant", "cat")
    assert [split.images[i][1] for i in range(len(split))] == [0, 0, 0, 1, 1]
    assert split.images[0][0].mode == "RGB"


def test_evaluation_prefers_val_to_test(tmp_path):
    text = image_folder(tmp_path, {"train": {"a": 1}, "test": {"a": 2}, "val": {"a": 3}})
    assert (data.open_eval(text).name, len(data.open_eval(text))) == ("val", 3)


def test_evaluation_takes_test_where_there_is_no_val(tmp_path):
    text = image_folder(tmp_path, {"train": {"a": 1}, "test": {"a": 2}})
    assert (data.open_eval(text).name, len(data.open_eval(text))) == ("test", 2)


def test_a_folder_of_classes_alone_is_every_part(tmp_path):
    text = image_folder(tmp_path, {"": {"a": 2, "b": 1}})
    train, held_out = data.open_train(text), data.open_eval(text)
    assert len(train) == len(held_out) == 3
    assert train.name == held_out.name == "all of it"


@pytest.mark.parametrize("folder", ["", "train"])
def test_images_without_labels_may_lie_loose(tmp_path, folder):
    text = image_folder(tmp_path, {folder: {"": 3}})
    assert len(data.enough_images(text, 3)) == 3
    assert data.images(text, Form(), 2).shape == (2, 3, *Form().image_size)
    with pytest.raises(DataError, match="has 3 training images, 4 were asked for"):
        data.enough_images(text, 4)
    with pytest.raises(DataError, match="has no folders"):
        data.open_train(text)


def test_the_state_of_images_changes_with_those_that_are_chosen(tmp_path):
    text = image_folder(tmp_path / "files", {"": {"": 3}})
    states = [data.state_of_images(text, count, seed) for count, seed in ((2, 0), (2, 0), (3, 0), (2, 1))]
    assert len(set(states)) == 3
    image_folder(tmp_path / "files", {"": {"": 3}}, side=9)
    assert data.state_of_images(text, 2, 0) != states[0]
    grey = idx_data(tmp_path / "arrays")
    before = data.state_of_images(grey, 5)
    idx_data(tmp_path / "arrays", side=9)
    assert data.state_of_images(grey, 5) != before


def test_grey_idx_images_become_rgb_with_their_labels(tmp_path):
    images = np.arange(2 * 4 * 5).reshape(2, 4, 5)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([7, 3]))
    split = data.open_split(f"idx:{tmp_path}", "test")
    image, label = split.images[1]
    assert label == 3
    assert np.array_equal(np.asarray(image), np.repeat(images[1][:, :, None], 3, axis=2))


def test_val_split_shares_out_every_training_image_once(tmp_path):
    text = idx_data(tmp_path, train=40)
    train = data.open_train(text, val_split=0.25, seed=3)
    held_out = data.open_eval(text, val_split=0.25, seed=3)
    assert (len(train), len(held_out)) == (30, 10)
    assert held_out.name.startswith("val")

    def pixels(split):
        return [split.images[i][0].tobytes() for i in range(len(split))]

    assert sorted(pixels(train) + pixels(held_out)) == sorted(pixels(data.open_split(text, "train")))


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_torchvision_folders_are_read_as_torchvision_unpacks_them(tmp_path, monkeypatch, kind):
    from torchvision import datasets

    # only the check of the real files' MD5 sums is left out
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    cls = datasets.CIFAR10 if kind == "cifar10" else datasets.CIFAR100
    folder = tmp_path / cls.base_folder
    folder.mkdir()
    key = "labels" if kind == "cifar10" else "fine_labels"
    for name, _ in cls.train_list + cls.test_list:
        pixels = np.full((2, 3072), 9, dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, key: [1, 0]}))
    meta = {cls.meta["key"]: ["ant", "bee"]}
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps(meta))
    split = data.open_split(f"{kind}:{tmp_path}", "test")
    assert split.class_names == ("ant", "bee")
    assert (split.images[0][1], split.images[0][0].size, len(split)) == (1, (32, 32), 2)
    assert data.open_eval(f"{kind}:{tmp_path}").name == "test"


def test_a_timm_reader_is_passed_through(tmp_path):
    image_folder(tmp_path, {"train": {"a": 2, "b": 2}, "validation": {"a": 1, "b": 2}})
    text = f"torch/image_folder:{tmp_path}"
    assert len(data.open_split(text, "train")) == 4
    split = data.open_eval(text)
    assert [split.images[i][1] for i in range(len(split))] == [0, 1, 1]


def test_a_stream_is_refused(monkeypatch):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from ()

    monkeypatch.setattr("timm.data.dataset_factory.create_dataset", lambda *args, **kwargs: Stream())
    with pytest.raises(DataError, match="is a stream without numbered images"):
        data.open_split("wds/somewhere", "train")


def test_calibration_images_are_normalised_training_images_chosen_by_the_seed(tmp_path):
    text, form = idx_data(tmp_path), Form()
    some = data.images(text, form, 5, seed=1)
    assert some.shape == (5, 3, 8, 8)
    assert torch.equal(some, data.images(text, form, 5, seed=1))
    assert not torch.equal(some, data.images(text, form, 5, seed=2))
    shape = (1, 3, 1, 1)
    pixels = (some.double() * torch.tensor(form.std).view(shape) + torch.tensor(form.mean).view(shape)) * 255
    known = {data.open_split(text, "train").images[i][0].getpixel((0, 0)) for i in range(48)}
    assert {tuple(round(v) for v in image[:, 0, 0].tolist()) for image in pixels} <= known


def test_the_evaluation_transform_is_timms(tmp_path):
    from timm.data import create_transform

    text = image_folder(tmp_path, {"train": {"a": 1}}, side=20)
    image = data.open_split(text, "train").images[0][0]
    form = Form(crop_pct=0.8, interpolation="bicubic", image_size=(12, 12))
    theirs = create_transform(
        (3, 12, 12), crop_pct=0.8, interpolation="bicubic", mean=form.mean, std=form.std
    )(image)
    ours = data.Normaliser(form, torch.device("cpu"))(data.pixels_transform(form)(image)[None])[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def _missing_folder(folder: Path) -> str:
    return f"imagefolder:{folder / 'nowhere'}"


def _empty_class(folder: Path) -> str:
    return image_folder(folder, {"train": {"a": 1, "empty": 0}})


def _no_classes(folder: Path) -> str:
    (folder / "train").mkdir()
    return f"imagefolder:{folder}"


def _no_idx(folder: Path) -> str:
    return f"idx:{folder}"


def _truncated_idx(folder: Path) -> str:
    text = idx_data(folder)
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-3])
    return text


def _truncated_gzip(folder: Path) -> str:
    text = idx_data(folder)
    images = folder / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-30])
    return text


def _not_idx(folder: Path) -> str:
    text = idx_data(folder)
    (folder / "train-labels-idx1-ubyte").write_bytes(b"hello, world")
    return text


def _no_cifar(folder: Path) -> str:
    return f"cifar10:{folder}"


def _no_scheme(folder: Path) -> str:
    return str(folder).replace("/", "_")


def _unknown_reader(folder: Path) -> str:
    return f"torch/nosuchset:{folder}"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_missing_folder, "nowhere"),
        (_empty_class, "train/empty has no images"),
        (_no_classes, "has no folders"),
        (_no_idx, "train-images-idx?-ubyte"),
        (_truncated_idx, "train-labels-idx1-ubyte: damaged file"),
        (_truncated_gzip, "train-images-idx3-ubyte.gz: damaged file"),
        (_not_idx, "not an IDX file"),
        (_no_cifar, "not a folder of torchvision's cifar10"),
        (_no_scheme, "names no data set"),
        (_unknown_reader, "timm can't open its train split"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_says_what_and_where(tmp_path, spoil, words):
    with pytest.raises(DataError) as caught:
        data.open_split(spoil(tmp_path), "train")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [b"", b"no image", None])
def test_a_damaged_image_is_named_by_its_path(tmp_path, damage):
    text = image_folder(tmp_path, {"train": {"a": 3}})
    path = tmp_path / "train" / "a" / "1.png"
    path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
    split = data.open_split(text, "train")
    with pytest.raises(DataError, match=r"train/a/1\.png: damaged image"):
        split.images[1]


def test_too_few_images_to_calibrate_on_is_said(tmp_path):
    with pytest.raises(DataError, match=r"48 training images, 100 were asked for; take fewer: --images 48 "):
        data.images(idx_data(tmp_path), Form(), 100)
