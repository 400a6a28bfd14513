"""Whether tensors by name fit a network, which one they are likely of, and what is said where they don't."""

from __future__ import annotations

import torch
from small_sources import assert_same, few_layers
from torch import nn

from lcc import weights
from lcc.weight_files import Checkpoint

STATE = few_layers().state_dict()


def test_a_common_first_word_is_dropped_where_that_makes_names_agree():
    tensors, actions = weights.align({f"model.{k}": v for k, v in STATE.items()}, STATE)
    assert_same(tensors, STATE)
    assert actions == ("dropped the prefix 'model.'",)


def test_a_common_first_word_that_the_network_has_too_stays():
    wanted = {f"model.{name}": tensor for name, tensor in STATE.items()}
    tensors, actions = weights.align(wanted, wanted)
    assert tensors.keys() == wanted.keys()
    assert actions == ()


def test_branches_for_training_are_left_out_unless_the_network_has_them():
    tensors = STATE | {"aux1.fc.weight": torch.zeros(2, 2)}
    without, actions = weights.align(tensors, STATE)
    assert without.keys() == STATE.keys()
    assert actions == ("left out the auxiliary classifier, which only training uses",)
    assert weights.align(tensors, tensors)[0].keys() == tensors.keys()


def test_names_of_torchvisions_densenet_files_are_brought_up_to_date():
    tensors, _ = weights.align({"features.denseblock1.denselayer1.norm.1.weight": torch.zeros(1)}, ())
    assert tensors.keys() == {"features.denseblock1.denselayer1.norm1.weight"}


def test_another_class_count_is_recognised_as_such():
    comparison = weights.compare(weights.shapes(few_layers(10).state_dict()), weights.shapes(STATE))
    assert comparison.classes == (10, 4)
    assert not comparison.fits


def test_another_width_is_not_taken_for_a_class_count():
    wider = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16, 4)
    ).state_dict()
    assert weights.compare(weights.shapes(wider), weights.shapes(STATE)).classes is None


def test_a_missing_batchnorm_counter_is_no_misfit():
    old = {name: tensor for name, tensor in STATE.items() if "num_batches" not in name}
    model = nn.Sequential(*few_layers())
    assert weights.load_into_(model, old).fits
    assert_same(model.state_dict(), STATE)


def test_a_tensor_with_nan_in_it_fits():
    diverged = {name: tensor * float("nan") for name, tensor in STATE.items() if tensor.is_floating_point()}
    assert weights.load_into_(nn.Sequential(*few_layers()), STATE | diverged).fits


def test_misfits_are_listed_in_words_with_count_and_first_names():
    got = {"a": (1,), "c": (2, 3)} | {f"x{i}": () for i in range(5)}
    comparison = weights.compare(got, {"a": (1,), "b": (4,), "c": (2, 4)})
    assert str(comparison) == (
        "1 missing (b); 5 not in the network (x0, x1, x2, ...); "
        "1 of another shape (c: 2x3 in the file, 2x4 in the network)"
    )


def test_half_precision_is_loaded_in_the_networks_own():
    model = few_layers()
    weights.load_into_(
        model,
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in STATE.items()},
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model[0].weight, STATE["0.weight"], rtol=1e-3, atol=1e-3)


class Versioned(nn.Linear):
    """Refuses tensors that come without its version, as torchvision's MNASNet does; knows its older name."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            if prefix + "matrix" not in state_dict:
                raise ValueError("version should be 2")
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "matrix")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_todays_names_are_not_taken_for_an_older_release():
    assert weights.load_into_(Versioned(2, 2, bias=False), {"weight": torch.ones(2, 2)}).fits


def test_names_that_the_modules_translate_fit():
    model = Versioned(2, 2, bias=False)
    assert weights.load_into_(model, {"matrix": torch.ones(2, 2)}).fits
    assert torch.equal(model.weight, torch.ones(2, 2))


def test_names_that_the_modules_refuse_are_listed():
    comparison = weights.load_into_(Versioned(2, 2, bias=False), {"other": torch.ones(2, 2)})
    assert comparison == weights.Comparison(("weight",), ("other",))


def checkpoint(tensors, tmp_path):
    return Checkpoint(tmp_path / "x.pth", dict(tensors))


def test_the_first_that_fits_ends_the_search(tmp_path):
    def candidates():
        yield "narrow", {"0.weight": (1,)}
        yield "right", weights.shapes(few_layers(10).state_dict())
        raise AssertionError("searched on")

    match = weights.best_match(checkpoint(STATE, tmp_path), candidates())
    assert match is not None
    assert (match.source, match.fits, match.comparison.classes) == ("right", True, (4, 10))


def test_without_a_fit_the_most_alike_is_given_with_its_share(tmp_path):
    wanted = weights.shapes(STATE)
    half = {name: shape for name, shape in wanted.items() if name.startswith(("0", "3"))}
    match = weights.best_match(checkpoint(STATE, tmp_path), [("none", {"z": (9,)}), ("some", half)])
    assert match is not None
    assert (match.source, match.fits, match.share) == ("some", False, len(half) / len(wanted))


def test_the_same_shapes_under_other_names_are_noticed(tmp_path):
    renamed = {f"body.{name}": tensor for name, tensor in STATE.items()} | {"x": torch.zeros(())}
    wanted = weights.shapes({name.replace("0.", "stem."): tensor for name, tensor in STATE.items()})
    match = weights.best_match(checkpoint(renamed, tmp_path), [("one", {"z": (9,)}), ("same", wanted)])
    assert match is not None
    assert (match.source, match.fits, match.same_shapes) == ("same", False, True)


def test_nothing_to_compare_with_gives_no_match(tmp_path):
    assert weights.best_match(checkpoint(STATE, tmp_path), []) is None
