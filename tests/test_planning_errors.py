"""The errors that a budget's plan is chosen by: kept on disk, found out anew, checked against true ones."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
from hosts import TinyResNet, seeded
from PIL import Image
from planning_setting import (
    FORM,
    SETTINGS,
    counted_passes,  # noqa: F401  # the fixture `passes`
    few_images,  # noqa: F401  # the fixture `data`
    network,
    planned,
)
from small_data import idx_data, image_folder
from torch import nn
from torch.nn import functional as F

from lcc import error_check, error_table
from lcc.errors import DataError
from lcc.measurements import code_of
from lcc.models import Loaded
from lcc.planning import plan_within
from lcc.recipe import Budget, Calibrate

pytestmark = pytest.mark.usefixtures("same_threads")


def test_a_second_run_finds_nothing_out_again(data, passes, monkeypatch):
    first = planned(data, "macs=70%")
    monkeypatch.setattr(error_table, "damages", None)
    monkeypatch.setattr(error_table.data, "images", None)
    second = planned(data, "macs=70%")
    assert second.rules == first.rules
    assert second.report.cost.endswith("kept from an earlier run")
    assert second.report.model_copy(update={"cost": first.report.cost}) == first.report
    planned(data, "macs=60%")
    assert len(passes) == 1


def test_another_target_finds_out_what_it_has_in_addition(data, passes):
    planned(data, "macs=70%", methods=("linear_mix",))
    planned(data, "params=70%", methods=("linear_mix", "circulant", "shared"))
    before, *after = (set(call[2]) for call in passes)
    assert len(after) == 2  # kernels are shared in another order of channels
    assert all(new and not before & new for new in after)


def test_slow_fits_that_were_done_survive_an_interruption(data, passes, monkeypatch):
    monkeypatch.setattr(error_table, "SLOW", 1)
    methods, keep = ("circulant", "mgic:form=conv", "mgic:form=conv,group_size=1"), error_table.Store.keep

    def interrupted(store, harms):
        keep(store, harms)
        if len(passes) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(error_table.Store, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        planned(data, "macs=90%", methods=methods)
    monkeypatch.setattr(error_table.Store, "keep", keep)
    planned(data, "macs=90%", methods=methods)
    asked = [key for call in passes for key in call[2]]
    assert len(asked) == len(set(asked))
    assert len(passes) > 3


@pytest.mark.parametrize(
    "change",
    [
        "attribute",
        "answer",
        "images",
        "seed",
        "data",
        "code",
        "torch",
        "preprocessing",
    ],
)
def test_what_errors_depend_on_is_found_out_anew(tmp_path, data, passes, change, monkeypatch):
    options = {"methods": ("circulant",)}
    budget, calibration = Budget(targets=("macs=80%",), **options), Calibrate(data=data, images=16)
    plan_within(network(), budget, calibration, SETTINGS)
    other = network()
    if change == "attribute":
        other.loaded.model.temperature = 2.0
    elif change == "answer":  # by something that is neither a weight, an attribute nor its own file
        forward = TinyResNet.forward
        monkeypatch.setattr(TinyResNet, "forward", lambda model, x: 2 * forward(model, x))
    elif change == "code":
        monkeypatch.setattr(error_table, "own_code", lambda: "another version")
    elif change == "torch":
        monkeypatch.setattr(error_table.torch, "__version__", "2.11.1")
    elif change == "preprocessing":
        form = FORM.model_copy(update={"std": (0.3, 0.3, 0.3)})
        loaded = Loaded(model=other.loaded.model, source=other.loaded.source, preprocessing=form)
        other = other.but(loaded=loaded)
    elif change == "data":
        calibration = Calibrate(data=idx_data(tmp_path / "other", train=30), images=16)
    else:
        calibration = calibration.model_copy(update={change: 15})
    plan_within(other, budget, calibration, SETTINGS)
    assert len(passes) == 2


@pytest.mark.parametrize("change", ["weight", "statistics", "order"])
def test_weights_are_known_by_themselves_and_not_only_by_what_the_network_gives(
    data, passes, change, monkeypatch
):
    monkeypatch.setattr(error_table, "answer_of", lambda *_: "")
    other = network()
    model, block = other.loaded.model, other.loaded.model.layer1
    if change == "weight":
        model.head.bias.data[0] += 1e-3
    elif change == "statistics":
        model.bn.running_var[0] += 1e-3
    else:  # of inner channels, which computes the same
        state = (block.conv1.weight, *block.bn1.parameters(), block.bn1.running_mean, block.bn1.running_var)
        for tensor in (*state, block.conv2.weight.transpose(0, 1)):
            tensor.data.copy_(tensor.flip(0))
    for one in (network(), other):
        planned(data, "macs=80%", methods=("circulant",), original=one)
    assert len(passes) == 2


def test_what_a_network_computes_by_is_its_whole_file():
    assert "def seeded(" in code_of(network().loaded.model)  # the file of TinyResNet
    assert "class Conv2d" not in code_of(network().loaded.model)


class Configured(TinyResNet):
    """A network that something else than a module's plain attribute may decide about."""


@dataclass
class Config:
    temperature: float = 1.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1.0, 2.0], [1.0, 3.0]),
        ({"scale": (1, [2])}, {"scale": (1, [3])}),
        (F.relu, F.gelu),
        (nn.ReLU, nn.GELU),
        (Config(), Config(2.0)),
        (None, 0),
    ],
)
def test_what_a_network_computes_by_is_its_attributes(one, other):
    model = seeded(Configured)
    model.own = one
    before = code_of(model)
    assert code_of(copy.deepcopy(model)) == before
    model.own = other
    assert code_of(model) != before


def test_what_a_network_computes_by_is_the_file_of_its_base_class():
    before = code_of(seeded(Configured))
    assert "class CalledTwice" in before  # the file of TinyResNet
    assert "def test_what_a_network_computes_by_is_its_attributes" in before


def test_other_images_under_the_same_names_are_looked_at_anew(tmp_path, passes):
    text, options = image_folder(tmp_path, {"": {"": 12}}), {"images": 12, "methods": ("circulant",)}
    for _ in range(2):
        planned(text, "macs=80%", **options)
    assert len(passes) == 1
    Image.new("RGB", (8, 8)).save(tmp_path / "3.png")
    planned(text, "macs=80%", **options)
    assert len(passes) == 2


def test_options_without_a_finite_error_are_told(data, passes, monkeypatch):
    real, said = error_table.damages, []

    def broken(*args, **keywords):
        found = real(*args, **keywords)
        return found._replace(entries=(found.entries[0]._replace(divergence=math.inf), *found.entries[1:]))

    monkeypatch.setattr(error_table, "damages", broken)
    planned(data, "macs=80%", settings=replace(SETTINGS, say=said.append))
    (note,) = [text for text in said if "finite" in text]
    assert re.fullmatch(r"note: left out, without a finite error: .* at .* \(and 0 more options\)", note)


def test_planning_leaves_the_network_and_the_random_numbers_alone(data):
    original = network()
    before = {key: value.clone() for key, value in original.loaded.model.state_dict().items()}
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    planned(data, "macs=70%", original=original)
    assert torch.equal(torch.rand(3), wanted)
    after = original.loaded.model.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_predicted_errors_are_set_beside_true_ones(data):
    budget = Budget(targets=("macs=70%",), methods=("linear_mix",))
    report = plan_within(
        network(), budget, Calibrate(data=data, images=12), SETTINGS, check_errors=True
    ).report
    count, rank = re.fullmatch(
        r"predicted errors of (\d+) options .* on 12 other .* (-?\d\.\d+); the true ones .*", report.checked
    ).groups()
    assert int(count) >= len(report.parts)
    assert 0.5 < float(rank) <= 1


def test_errors_are_checked_on_images_that_nothing_was_fitted_to(data, monkeypatch):
    fitted, judged = [], []
    calibrate, judge = error_check.calibrate.calibrate_, error_check._log_probabilities
    monkeypatch.setattr(
        error_check.calibrate, "calibrate_", lambda *args: fitted.append(args[3]) or calibrate(*args)
    )
    monkeypatch.setattr(
        error_check, "_log_probabilities", lambda model, seen: judged.append(seen) or judge(model, seen)
    )
    budget = Budget(targets=("macs=80%",), methods=("circulant",))
    plan_within(network(), budget, Calibrate(data=data, images=12), SETTINGS, check_errors=True)
    assert len(judged) == len(fitted) + 1 > 2  # the original's, and each option's
    assert all(torch.equal(images, fitted[0]) for images in fitted)
    assert all(torch.equal(images, judged[0]) for images in judged)
    assert len(judged[0]) == 12
    assert not any(torch.equal(one, other) for one in fitted[0] for other in judged[0])


def test_errors_are_checked_on_images_that_lie_loose(tmp_path):
    text = image_folder(tmp_path, {"": {"": 24}})
    budget = Budget(targets=("macs=80%",), methods=("circulant",))
    report = plan_within(
        network(), budget, Calibrate(data=text, images=12), SETTINGS, check_errors=True
    ).report
    assert "on 12 other images" in report.checked


def test_too_few_images_to_check_errors_on_are_said_first(data):
    budget = Budget(targets=("macs=70%",))
    with pytest.raises(DataError, match=r"errors are checked on as many more .* give --images \d+"):
        plan_within(network(), budget, Calibrate(data=data, images=10**6), SETTINGS, check_errors=True)


class Keeping(TinyResNet):
    """A network that keeps its features, as for a picture of what it looks at."""

    def forward(self, x):
        self.maps = self.layer1(F.relu(self.bn(self.stem(x))))
        y = self.layer2(F.relu(self.down_bn(self.down(self.maps))))
        return self.head(y.mean((2, 3)))


def test_a_network_that_keeps_an_activation_has_its_errors_checked(data):
    original = network()
    original = original.but(loaded=replace(original.loaded, model=seeded(Keeping).float()))
    said = plan_within(
        original, Budget(targets=("macs=80%",)), Calibrate(data=data, images=12), SETTINGS, check_errors=True
    ).report.checked
    assert re.search(r"rank correlation .*; the true ones are [0-9.e+-]+ times as large \(median\)", said)


class Early(TinyResNet):
    """A network that uses its last block for what is not an image, such as noise without a mean."""

    def forward(self, x):
        y = F.relu(self.down_bn(self.down(self.layer1(F.relu(self.bn(self.stem(x)))))))
        return self.head((self.layer2(y) if x.mean().abs() < 0.2 else y).mean((2, 3)))


def test_what_no_image_reaches_is_left_out_and_told(data):
    original, said = network(), []
    original = original.but(loaded=replace(original.loaded, model=seeded(Early).float()))
    settings = replace(SETTINGS, say=said.append)
    report = planned(data, "macs=90%", original=original, settings=settings)[1]
    assert not any(site.startswith("layer2") for part in report.parts for site in part.sites)
    assert any(
        re.match(r"note: left out, without a finite error: .* at layer2.conv[12]", text) for text in said
    )
