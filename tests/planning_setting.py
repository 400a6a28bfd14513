"""What plans within a budget are made from in tests: a small network and a few images; and what it costs."""

from __future__ import annotations

import pytest
from hosts import TinyResNet, seeded
from small_data import idx_data

from lcc import error_table
from lcc.conversion import convert_network
from lcc.counts import count_macs, count_params
from lcc.measure import Conditions
from lcc.models import Loaded, Preprocessing, Source
from lcc.network import Network
from lcc.planning import plan_within
from lcc.recipe import Budget, Calibrate
from lcc.settings import Settings

SETTINGS = Settings(device="cpu", threads=1, trust_code=True, say=lambda _: None)
FORM = Preprocessing(image_size=(8, 8), crop_pct=1.0)
CONDITIONS = Conditions(
    runtime="a stand-in",
    version="1",
    device="no device",
    threads=1,
    batch=1,
    image_size="8x8",
    dtype="float32",
    rounds=1,
)


@pytest.fixture(scope="module", name="data")
def few_images(tmp_path_factory):
    return idx_data(tmp_path_factory.mktemp("data"), train=24)


@pytest.fixture(name="passes")
def counted_passes(monkeypatch):
    """Count how often errors are found out."""
    made, real = [], error_table.damages
    monkeypatch.setattr(error_table, "damages", lambda *a, **k: made.append(a) or real(*a, **k))
    return made


def network(seed=0):
    model = seeded(TinyResNet, seed=seed).float()
    source = Source(id="py:hosts:TinyResNet", weights="default")
    return Network(name="tiny", loaded=Loaded(model=model, source=source, preprocessing=FORM))


def planned(data, /, *targets, original=None, images=16, settings=SETTINGS, **options):
    budget = Budget(targets=targets, **options)
    return plan_within(original or network(), budget, Calibrate(data=data, images=images), settings)


def stored_bytes(model):
    names = set(model.state_dict())
    kept = [buffer for name, buffer in model.named_buffers() if name in names]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *kept))


def costs(one):
    """Count what a network costs, shared parameters once."""
    model = one.loaded.model
    return {
        "params": count_params(model),
        "macs": count_macs(model, one.example).macs,
        "size": stored_bytes(model),
    }


def converted(rules, data, folder):
    calibration = Calibrate(data=data, images=16)
    return convert_network(network(), rules, calibration, SETTINGS, fits=folder / "fits")[1]
