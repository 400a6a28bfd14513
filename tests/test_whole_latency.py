"""Whole networks timed beside their original, and which layers' times count."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hosts import CalledTwice, seeded
from planning_setting import CONDITIONS, network

from lcc import models, whole_latency
from lcc.candidates import options_for
from lcc.latency_table import Timing
from lcc.measure import Bench
from lcc.methods.linear_mix import LinearMix, LinearMixOp
from lcc.methods.reaction_diffusion import RdImplicit
from lcc.methods.shared import Shared
from lcc.network import Network, sites_of
from lcc.plan import Rule, make_plan
from lcc.surgery import replace_
from lcc.timing import Latency, Speedup
from lcc.whole_latency import Clock

pytestmark = pytest.mark.usefixtures("same_threads")


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_a_network_is_converted_and_timed_beside_its_original(runtime, monkeypatch):
    original, seen = network(), {}
    timing = Timing(runtime=runtime, batch=3, threads=2, rounds=9)
    same = {"threads": 2, "device": "cpu", "rounds": 9}

    def bench(networks, *examples, **how):
        seen.update(networks)
        assert how == {"batch": 3, **same} if runtime == "onnx" else same
        assert [len(example) for example in examples] == ([] if runtime == "onnx" else [3])
        speedups = {"converted": Speedup(median=4.0, p10=3.0, p90=5.0)}
        times = {"dense": 8.0, "converted": 2.0}
        latencies = {
            name: Latency(median_ms=ms, p10_ms=ms, p90_ms=ms, iqr_ms=0.1, runs=9, noisy=ms == 8)
            for name, ms in times.items()
        }
        return Bench(conditions=CONDITIONS, latencies=latencies, speedups=speedups)

    monkeypatch.setattr(whole_latency, f"bench_{runtime}", bench)
    rules = (Rule(match=("layer2.conv1",), method=LinearMix()), Rule(match=("*",)))
    whole = Clock(original, sites_of(original), timing)._timed(rules)
    assert (whole.before_ms, whole.ratio, whole.noisy, whole.rules) == (8.0, 0.25, True, rules)
    assert list(seen) == ["dense", "converted"]
    if runtime == "onnx":
        sizes = [len(file) for file in seen.values()]
        assert sizes[1] < sizes[0]
    else:
        kinds = [type(model.layer2.conv1) for model in seen.values()]
        assert kinds == [torch.nn.Conv2d, LinearMixOp]


def test_a_whole_network_is_timed_with_weights_that_no_fit_makes_slower(monkeypatch):
    seen = {}

    def bench(networks, *_, **__):
        seen.update(networks)
        raise ZeroDivisionError

    monkeypatch.setattr(whole_latency, "bench_torch", bench)
    original, rules = network(), (Rule(match=("layer1",), method=RdImplicit()),)
    with pytest.raises(ZeroDivisionError):
        Clock(original, sites_of(original), Timing(runtime="torch"))._timed(rules)
    step, fresh = seen["converted"].layer1, RdImplicit().build(seen["converted"].layer1.spec)
    assert step.amplification() > 2 * fresh.amplification()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_a_scale_for_each_site_takes_no_time_where_a_norm_takes_it(runtime, norm):
    original = network()
    sites = [site if norm else site.model_copy(update={"norm": None}) for site in sites_of(original)]
    clock = Clock(original, tuple(sites), Timing(runtime=runtime))
    plain, scaled = Shared(align=False), Shared(align=False, scale=True)
    free = {option.method: not clock._timed_places(option) for option in options_for(sites, [plain, scaled])}
    assert free == {plain: True, scaled: norm and runtime == "onnx"}


def test_a_layer_that_is_called_twice_is_timed_at_both_sizes():
    called = Network(name="twice", loaded=replace(network().loaded, model=seeded(CalledTwice).float()))
    clock, (twice,) = Clock(called, sites_of(called), Timing()), options_for(sites_of(called), [LinearMix()])
    assert [str(place.size) for place in clock._timed_places(twice)] == ["8x8", "4x4"]


def test_a_network_that_was_converted_before_is_timed_for_itself(data):
    def key(method):
        before = network()
        model = copy.deepcopy(before.loaded.model)
        plan = make_plan(sites_of(before), (Rule(match=("layer1",), method=method),))
        with models.seeded(0):
            replace_(model, plan)
        one = before.but(loaded=replace(before.loaded, model=model), plan=plan)
        return Clock(one, sites_of(one), Timing())._store._name

    keys = [key(RdImplicit(kernel_size=size)) for size in (3, 5, 3)]
    assert keys[0] == keys[2] != keys[1]
