"""Fits that are kept while others are made."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from hosts import photos, seeded
from kills import KilledError
from torch import nn

from lcc.calibrate import calibrate_
from lcc.errors import ArtifactError
from lcc.fit_store import FitStore, discard
from lcc.measurements import content_key
from lcc.methods import Fit
from lcc.methods.reaction_diffusion import RdExplicit
from lcc.plan import make_plan, rules_for
from lcc.surgery import find_sites, replace_
from lcc.zoo import BasicBlock


def network():
    return seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), BasicBlock(4, 4), BasicBlock(4, 4)))


def converted(store, *, killed_after=None):
    """Return a converted network; `killed_after` so many sites, calibration dies."""
    model = network()
    images = photos(10)
    sites = find_sites(model, images[:1])
    torch.manual_seed(0)
    originals = replace_(model, make_plan(sites, rules_for(RdExplicit())))
    done = []

    def on_site(name, fit):
        done.append(name)
        if len(done) == killed_after:
            raise KilledError

    calibration = calibrate_(model, originals, sites, images, on_site=on_site, store=store)
    return model, calibration


def test_an_interrupted_calibration_goes_on_to_the_same_bits(tmp_path):
    wanted, calibration = converted(FitStore(tmp_path / "whole", "key", resume=False))
    with pytest.raises(KilledError):
        converted(FitStore(tmp_path / "fits", "key", resume=False), killed_after=1)
    kept = list((tmp_path / "fits").glob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in kept]
    got, again = converted(FitStore(tmp_path / "fits", "key", resume=True))
    assert len(kept) == 1
    assert [file.stat().st_mtime_ns for file in kept] == before
    assert again == calibration
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor)


def test_fits_of_an_earlier_conversion_are_not_mixed_with_new_ones(tmp_path):
    FitStore(tmp_path, "key", resume=False)
    FitStore(tmp_path, "other", resume=False)  # nothing was kept yet
    FitStore(tmp_path, "key", resume=False).keep("a", nn.Linear(2, 2), Fit(how="data"))
    with pytest.raises(ArtifactError, match="--resume"):
        FitStore(tmp_path, "key", resume=False)
    with pytest.raises(ArtifactError, match="another network"):
        FitStore(tmp_path, "other", resume=True)


def test_a_damaged_fit_is_named(tmp_path):
    store = FitStore(tmp_path, "key", resume=False)
    operator = nn.Linear(2, 2)
    assert store.restore_("a", operator) is None
    (tmp_path / "a.safetensors").write_bytes(b"torn")
    with pytest.raises(ArtifactError, match=r"a\.safetensors is damaged"):
        store.restore_("a", operator)


def test_the_key_depends_on_weights_images_and_plan():
    model, images = network(), photos(2)
    key = content_key(model, images, "plan")
    assert key == content_key(network(), photos(2), "plan")
    assert key != content_key(model, images, "another plan")
    assert key != content_key(model, images + 1, "plan")
    model[0].bias.data[0] += 1
    assert key != content_key(model, images, "plan")


def test_the_key_depends_on_what_the_network_computes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    keys = set()
    for function in ("relu", "tanh"):
        (tmp_path / "own.py").write_text(
            "from torch import nn\n\nclass Own(nn.Linear):\n    def forward(self, x):\n"
            f"        return super().forward(x).{function}()\n"
        )
        sys.modules.pop("own", None)
        importlib.invalidate_caches()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            keys.add(content_key(importlib.import_module("own").Own(2, 2), None))
    assert len(keys) == 2


def test_only_what_lcc_wrote_is_removed(tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    FitStore(mine, "key", resume=False).keep("a", nn.Linear(2, 2), Fit(how="data"))
    theirs.mkdir()
    (theirs / "a.safetensors").write_bytes(b"precious")
    discard(mine)
    discard(theirs)
    assert not mine.exists()
    assert (theirs / "a.safetensors").read_bytes() == b"precious"
    with pytest.raises(ArtifactError, match="holds something else"):
        FitStore(theirs, "key", resume=False)
