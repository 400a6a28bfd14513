from __future__ import annotations

import numpy as np
import pytest
import torch
from small_data import Form, idx_data, tiny_network
from training_process import options

from lcc.errors import RecipeError
from lcc.features import check_sites, distance, watched
from lcc.steps import Stepper, Teacher
from lcc.train import finetune


def normal_slowly(x):
    """Every channel brought to mean 0 and variance 1, channel by channel."""
    channels = np.moveaxis(x.numpy(), 1, 0)
    return np.stack([(c - c.mean()) / np.sqrt(c.var() + 1e-5) for c in channels])


def test_the_distance_is_the_mean_square_of_what_normalised_outputs_differ_by():
    generator = torch.Generator().manual_seed(0)
    outputs = [[torch.randn(4, 3, 5, 5, generator=generator) for _ in range(2)] for _ in range(2)]
    ours, theirs = ({"conv": each, "other": [each[0] ** 2]} for each in outputs)
    pairs = [*zip(*outputs, strict=True), (outputs[0][0] ** 2, outputs[1][0] ** 2)]
    wanted = np.mean([((normal_slowly(a) - normal_slowly(b)) ** 2).mean() for a, b in pairs])
    assert float(distance(ours, theirs)) == pytest.approx(wanted, rel=1e-5)


def test_the_size_and_mean_of_channels_do_not_count():
    x = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    stretch, shift = torch.tensor([0.5, 2.0, 3.0, 10.0]), torch.tensor([1.0, -2.0, 0.0, 5.0])
    moved = x * stretch[:, None, None] + shift[:, None, None]
    assert abs(float(distance({"conv": [moved]}, {"conv": [x]}))) < 1e-6


def test_under_autocast_a_small_distance_is_not_rounded_off():
    x = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    ours, theirs = {"conv": [x]}, {"conv": [x + 0.05 * x.roll(1, 0)]}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = distance(ours, theirs)
    torch.testing.assert_close(got, distance(ours, theirs))


def test_other_shapes_are_refused():
    with pytest.raises(
        RecipeError, match=r"features: conv gives \(2, 3, 4, 4\), the teacher's \(2, 3, 2, 2\)"
    ):
        distance({"conv": [torch.zeros(2, 3, 4, 4)]}, {"conv": [torch.zeros(2, 3, 2, 2)]})


def test_outputs_are_watched_in_the_block_and_no_longer():
    model = tiny_network()
    name = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d))
    x = torch.randn(2, 3, 8, 8) if model.get_submodule(name).in_channels == 3 else torch.randn(2, 1, 8, 8)
    with watched(model, [name]) as seen:
        model(x)
    model(x)
    assert len(seen[name]) == 1
    assert torch.equal(seen[name][0], model.get_submodule(name)(x))
    assert not model.get_submodule(name)._forward_hooks


def test_a_teacher_without_such_modules_is_refused_before_training(tmp_path):
    data = idx_data(tmp_path / "data")
    with pytest.raises(RecipeError, match="the teacher has no module called nowhere; set features = 0"):
        finetune(
            tiny_network(),
            Form(),
            options(data, distill=0.5, features=1.0),
            teacher=tiny_network(),
            sites=("nowhere",),
            device="cpu",
            workers=0,
            say=lambda _: None,
        )
    with pytest.raises(RecipeError, match="nothing was converted"):
        check_sites(tiny_network(), ())


def first_loss(data, **changes):
    torch.manual_seed(0)
    model, expert = tiny_network(), tiny_network()
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    sites = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    stepper = Stepper(model.train(), options(data, distill=0.5, **changes), 10, 3, sites)
    channels = next(iter(model.parameters())).shape[1]
    x = torch.randn(8, channels, 8, 8, generator=torch.Generator().manual_seed(2))
    stepper.teacher = Teacher.make(expert, Form(), Form(), torch.device("cpu"))
    with watched(model, sites) as own, watched(expert, sites) as theirs:
        model(x)
        stepper.teacher(x)
    apart = float(distance(own, theirs).detach())
    loss, _ = stepper.take(0, x, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))
    return float(loss), apart


def test_the_loss_has_so_many_times_the_distance_in_it(tmp_path):
    data = idx_data(tmp_path / "data")
    plain, apart = first_loss(data)
    taught, _ = first_loss(data, features=3.0)
    assert apart > 0.01
    assert taught == pytest.approx(plain + 3 * apart, rel=1e-4)
