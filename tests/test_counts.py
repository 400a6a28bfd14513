import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lcc.counts import count_macs, count_norm_params, count_params, fvcore_macs
from lcc.errors import SourceError
from lcc.methods.circulant import Circulant
from lcc.methods.linear_mix import LinearMix
from lcc.methods.shared import Shared
from lcc.ops.circulant import periodic_circulant
from lcc.specs import ConvSpec, Size, fft_macs

SPEC = ConvSpec(in_channels=8, out_channels=8, kernel_size=(3, 3), padding=(1, 1))


class Network(nn.Module):
    """A residual network with everything that is counted, and things that cost nothing."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = self.up(x + self.grouped(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_a_shared_parameter_is_counted_once():
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    assert count_params(nn.Sequential(a, b)) == 16


def test_buffers_are_no_parameters():
    assert count_params(nn.BatchNorm2d(7)) == 14


def test_parameters_of_norms_are_told_apart_each_shared_one_once():
    norm = nn.BatchNorm2d(7)
    network = nn.Sequential(nn.Conv2d(3, 7, 3), norm, nn.PReLU(7), nn.Sequential(norm, nn.GroupNorm(7, 7)))
    assert count_norm_params(network) == 14 + 14


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Conv1d(4, 6, 5, groups=2), (4, 20), 6 * 2 * 5 * 16),
        (nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(0, 2)), (4, 9, 11), 6 * 4 * 15 * 7 * 6),
        (nn.Conv2d(4, 4, 3, dilation=2, groups=4), (4, 9, 9), 4 * 9 * 25),
        (nn.Conv3d(2, 3, 2), (2, 4, 4, 4), 3 * 2 * 8 * 27),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 7), 4 * 35 * 3 * 9),
        (nn.Linear(10, 3), (7, 10), 7 * 10 * 3),
        (nn.BatchNorm2d(4), (4, 5, 5), 0),
    ],
)
def test_macs_follow_from_the_shapes(module, shape, macs):
    count = count_macs(module, torch.randn(1, *shape))
    assert (count.macs, count.flops, count.uncounted) == (macs, 2 * macs, {})


def test_macs_are_for_one_image_whatever_the_batch():
    network = Network()
    assert count_macs(network, torch.randn(5, 3, 16, 16)) == count_macs(network, torch.randn(1, 3, 16, 16))


def test_macs_agree_with_fvcore():
    network, example = Network(), torch.randn(1, 3, 16, 16)
    assert count_macs(network, example).macs == fvcore_macs(network, example).macs


def test_a_module_called_twice_costs_twice():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    once = count_macs(conv, torch.randn(1, 4, 8, 8)).macs
    assert count_macs(nn.Sequential(conv, conv), torch.randn(1, 4, 8, 8)).macs == 2 * once


def test_an_operator_that_is_given_parts_of_images_costs_its_formula_for_each():
    class Halves(nn.Sequential):
        def forward(self, x):
            return super().forward(torch.cat(x.chunk(2, dim=3)))

    wanted = 2 * LinearMix().cost(SPEC, Size(height=6, width=4)).macs
    assert count_macs(Halves(LinearMix().build(SPEC)), torch.randn(1, 8, 6, 8)).macs == wanted


@pytest.mark.parametrize("stencil", ["square", "cross", "horizontal"])
def test_an_operator_costs_what_its_method_says_and_what_its_parts_cost(stencil):
    method = LinearMix(stencil=stencil)
    network, example = nn.Sequential(method.build(SPEC)), torch.randn(1, 8, 6, 7)
    wanted = method.cost(SPEC, Size(height=6, width=7)).macs
    assert count_macs(network, example).by_module == {"0": wanted}
    assert fvcore_macs(network, example).macs == wanted


@pytest.mark.parametrize("inner", [None, LinearMix()], ids=str)
def test_an_operator_inside_another_is_a_part_of_it_and_counts_once(inner):
    method = Shared(method=inner)
    network, example = nn.Sequential(method.build(SPEC), nn.ReLU()), torch.randn(1, 8, 6, 7)
    wanted = method.cost(SPEC, Size(height=6, width=7)).macs
    assert count_macs(network, example).by_module == {"0": wanted}
    assert fvcore_macs(network, example).macs == wanted


class Applied(nn.Module):
    """A function of the image, and of a weight that is transformed as well."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(1, 4, 6, 10))

    def forward(self, x):
        return self.function(x, self.weight)


C, H, W = 4, 6, 10  # channels, height, width


@pytest.mark.parametrize(
    ("function", "macs"),
    [
        (lambda x, _: torch.fft.fft(x), C * H * fft_macs(W, real=False)),
        (lambda x, _: torch.fft.ifft(x, dim=1), H * W * fft_macs(C, real=False)),
        (lambda x, _: torch.fft.fft2(x), C * fft_macs(H * W, real=False)),
        (lambda x, _: torch.fft.ifft2(x), C * fft_macs(H * W, real=False)),
        (lambda x, _: torch.fft.fftn(x), fft_macs(C * H * W, real=False)),
        (lambda x, _: torch.fft.ifftn(x, dim=(1, 2)), W * fft_macs(C * H, real=False)),
        (lambda x, _: torch.fft.rfft(x, dim=2), C * W * fft_macs(H, real=True)),
        (lambda x, _: torch.fft.rfft(x, n=11), C * H * fft_macs(11, real=True)),
        (lambda x, _: torch.fft.rfft(x, n=7), C * H * fft_macs(7, real=True)),
        (lambda x, _: torch.fft.irfft(x, n=7), C * H * fft_macs(7, real=True)),
        (lambda x, _: torch.fft.irfft(x), C * H * fft_macs(2 * (W - 1), real=True)),
        (lambda x, _: torch.fft.rfft2(x), C * fft_macs(H * W, real=True)),
        (lambda x, _: torch.fft.rfft2(x, s=(8, 9)), C * fft_macs(72, real=True)),
        (lambda x, _: torch.fft.irfft2(x, s=x.shape[2:]), C * fft_macs(H * W, real=True)),
        (lambda x, _: torch.fft.rfftn(x, dim=(1, 2, 3)), fft_macs(C * H * W, real=True)),
        (lambda x, _: torch.fft.rfftn(x, s=(8, 8)), C * fft_macs(64, real=True)),
        (lambda x, _: torch.fft.irfftn(x, s=x.shape[1:], dim=(1, 2, 3)), fft_macs(C * H * W, real=True)),
    ],
)
def test_fourier_transforms_are_counted_by_their_points(function, macs):
    counted = fvcore_macs(Applied(function), torch.randn(1, C, H, W))
    assert counted.macs == macs > 0
    assert not any("fft" in op for op in counted.unsupported)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, weight: x * torch.fft.rfft2(weight).real.sum(),
        lambda x, weight: x * torch.fft.rfft2(weight[:, :, : x.shape[2]] + x.new_zeros(1)).real.sum(),
    ],
)
def test_transforms_of_weights_alone_are_not_counted(function):
    assert fvcore_macs(Applied(function), torch.randn(1, C, H, W)).macs == 0


def test_a_transform_of_weights_and_image_together_is_counted():
    model = Applied(lambda x, weight: torch.fft.rfft2(nn.functional.relu(weight * x)))
    assert fvcore_macs(model, torch.randn(1, C, H, W)).macs == C * fft_macs(H * W, real=True)


def test_one_image_of_a_batch_is_counted():
    model = Applied(lambda x, _: torch.fft.fft2(x))
    assert fvcore_macs(model, torch.randn(5, C, H, W)).macs == C * fft_macs(H * W, real=False)


def test_the_periodic_circulant_convolution_costs_two_transforms():
    weight = torch.randn(C, 3, 3)
    counted = fvcore_macs(Applied(lambda x, _: periodic_circulant(x, weight)), torch.randn(1, C, H, W))
    assert counted.macs == 2 * fft_macs(C * H * W, real=True)


def test_a_circulant_operator_is_counted_by_its_formula():
    network, example = nn.Sequential(Circulant().build(SPEC)), torch.randn(1, 8, 6, 7)
    wanted = 42 * (8 * 8 + 2 * 9 * 8 + 8 * 8)
    assert count_macs(network, example).by_module == {"0": wanted}
    assert fvcore_macs(network, example).macs == wanted


def test_a_module_with_parameters_of_an_unknown_kind_is_listed():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return x @ self.matrix

    count = count_macs(nn.Sequential(nn.Linear(3, 3), Odd()), torch.randn(1, 3))
    assert (count.macs, count.uncounted) == (9, {"1": "Odd"})


def test_a_module_whose_weights_the_host_uses_itself_is_listed():
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return F.linear(x, self.fc.weight)

    count = count_macs(Host(), torch.randn(1, 3))
    assert (count.macs, count.never_called) == (0, ("fc",))


def test_counting_leaves_modes_and_running_statistics_alone():
    network = Network().train()
    network.norm.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    count_macs(network, torch.randn(2, 3, 16, 16))
    assert [module.training for module in (network, network.stem, network.norm)] == [True, True, False]
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not network.stem._forward_hooks


def test_an_input_given_by_keyword_is_counted():
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 4, 2)

        def forward(self, x):
            return self.up(input=x)

    assert count_macs(Host(), torch.zeros(1, 3, 5, 5)).macs == 3 * 25 * 4 * 4


def test_a_network_that_can_not_run_at_a_size_is_refused_in_words():
    net = nn.Sequential(nn.Flatten(), nn.Linear(75, 2))
    assert count_macs(net, torch.zeros(1, 3, 5, 5)).macs == 150
    with pytest.raises(SourceError, match=r"can't run on a 1x3x6x6 input \(.*\); give it another"):
        count_macs(net, torch.zeros(1, 3, 6, 6))
