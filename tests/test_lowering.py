import math

import torch
from stand_in import SPEC, StandIn, approximating
from torch import nn

from lcc.lowering import choose, example_for, lower_, milliseconds
from lcc.methods.linear_mix import LinearMix
from lcc.specs import Size, StepSpec

SIZE, LARGER = Size(height=6, width=5), Size(height=8, width=5)


class Timer:
    """Times that a test gives in turn; remembers what was timed."""

    def __init__(self, *times):
        self.times, self.timed = times, []

    def __call__(self, modules, example):
        self.timed.append((len(modules), tuple(example.shape)))
        return self.times[: len(modules)]


def test_the_fastest_of_those_within_the_tolerance_is_taken():
    op, timer = StandIn(approximating(1e-4, 5e-4, 2e-3, 0.0)), Timer(3.0, 1.0, 2.0)
    assert choose(op, SIZE, timer=timer).how == "off by 0.0005"
    assert timer.timed == [(3, (1, 4, 6, 5))]


def test_a_looser_tolerance_lets_more_compete():
    op = StandIn(approximating(1e-4, 5e-3))
    assert choose(op, SIZE, tolerance=1e-2, timer=Timer(2.0, 1.0)).relative_error == 5e-3


def test_one_that_is_alone_within_the_tolerance_is_not_timed():
    timer = Timer()
    assert choose(StandIn(approximating(2e-3, 0.0)), SIZE, timer=timer).relative_error == 0
    assert timer.timed == []


def test_where_none_is_within_the_tolerance_the_closest_is_taken_and_that_is_said():
    lowering = choose(StandIn(approximating(math.nan, 0.02, 0.01)), SIZE, timer=Timer())
    assert lowering.how == "off by 0.01, past the tolerance of 1e-03"
    assert lowering.relative_error == 0.01


def test_operators_alike_are_timed_once_and_others_again():
    timer, timed, two_exact = Timer(1.0, 2.0), {}, approximating(0.0, 0.0)

    def see(lowered=two_exact, size=SIZE, spec=SPEC):
        choose(StandIn(lowered, spec), size, timed=timed, timer=timer)
        return len(timer.timed)

    assert [see(), see()] == [1, 1]
    assert see(size=LARGER) == 2
    assert see(spec=SPEC.model_copy(update={"in_channels": 8})) == 3
    assert see(lambda op, size: [(nn.Conv2d(4, 4, 5, padding=2),), (op.conv,)]) == 4


def test_what_was_learnt_of_one_operator_is_applied_to_its_like():
    timed = {}
    choose(StandIn(approximating(1e-4, 0.0)), SIZE, timed=timed, timer=Timer(2.0, 1.0))
    again = choose(StandIn(approximating(2e-4, 0.0)), SIZE, timed=timed, timer=Timer(1.0, 2.0))
    assert again.relative_error == 0


def test_more_work_takes_longer_in_onnx_runtime():
    few, many = milliseconds([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 64, 7)], torch.randn(1, 4, 48, 48))
    assert 0 < 2 * few < many


class Host(nn.Module):
    """One operator under two names, called on two sizes."""

    def __init__(self, op):
        super().__init__()
        self.first, self.other = op, nn.Sequential(op, nn.ReLU())

    def forward(self, x):
        return self.other(self.first(x)[:, :, :6])


def test_a_shared_operator_is_lowered_under_all_its_names():
    host, x = Host(StandIn()).eval(), torch.randn(2, 4, 8, 5)
    wanted = host(x)
    assert list(lower_(host, {host.first: [LARGER, SIZE]})) == ["first"]
    assert host.first is host.other[0]
    assert torch.equal(host(x), wanted)


def test_weights_that_are_the_same_for_every_size_are_kept_once():
    host = Host(LinearMix().build(SPEC)).eval()
    before = sum(parameter.numel() for parameter in host.parameters())
    lower_(host, {host.first: [LARGER, SIZE]})
    assert sum(parameter.numel() for parameter in host.parameters()) == before


def test_an_operator_that_depends_on_the_size_is_lowered_for_every_one():
    class Mean(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.register_buffer("share", torch.full((size.height, size.width), 1 / size.pixels))

        def forward(self, x):
            return (x * self.share).sum((2, 3), keepdim=True) + x

    op = StandIn(lambda op, size: [(Mean(size), f"mean of {size}")])
    op.forward = lambda x: x.mean((2, 3), keepdim=True) + x
    host, x = Host(op).eval(), torch.randn(2, 4, 8, 5)
    wanted = host(x)
    chosen = lower_(host, {op: [LARGER, SIZE]})
    assert [lowering.how for lowering in chosen["first"]] == ["mean of 8x5", "mean of 6x5"]
    torch.testing.assert_close(host(x), wanted)


def test_an_operator_inside_another_is_its_affair_and_one_never_called_stays():
    outer, idle = StandIn(), StandIn()
    outer.inner = StandIn()
    host = nn.Sequential(outer, idle)
    chosen = lower_(host, {outer: [SIZE], outer.inner: [SIZE]})
    assert list(chosen) == ["0"]
    assert isinstance(host[0], nn.Conv2d)
    assert host[1] is idle


def test_an_example_has_as_many_channels_as_a_stage_changing_block_takes():
    spec = StepSpec(channels=8, in_channels=4, stride=(2, 2), convs=(SPEC,))
    assert example_for(spec, Size(height=6, width=5), batch=3).shape == (3, 4, 6, 5)
