"""Small networks that use convolutions in every way that makes replacing one hard."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from lcc.methods.linear_mix import LinearMix
from lcc.plan import Group, Plan, make_plan, rules_for
from lcc.surgery import find_sites, replace_


def seeded(factory, *arguments, seed=0, **options):
    """Return a network with seeded weights and BatchNorms that do something, in float64 and eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory(*arguments, **options)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                stir_(module)
    return model.double().eval()


def stir_(norm):
    """Give a BatchNorm statistics and an affine part that are not one and zero."""
    for tensor, low, high in (
        (norm.running_mean, -0.5, 0.5),
        (norm.running_var, 0.5, 2.0),
        (norm.weight, 0.5, 1.5),
        (norm.bias, -0.3, 0.3),
    ):
        if tensor is not None:
            nn.init.uniform_(tensor, low, high)


def photos(count, size=12, channels=3, *, seed=1):
    """Images whose channels and neighbouring pixels depend on each other, (N, C, H, W) in float64."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(count, channels, size, size, dtype=torch.float64, generator=generator)
    mixing = torch.randn(channels, channels, dtype=torch.float64, generator=generator)
    return F.avg_pool2d(torch.einsum("ij,njhw->nihw", mixing, white), 3, stride=1, padding=1) * 2 + 0.2


def conv3(c_in, c_out=None, stride=1, *, bias=False):
    return nn.Conv2d(c_in, c_out or c_in, 3, stride=stride, padding=1, bias=bias)


class Block(nn.Module):
    """relu(x + bn2(conv2(relu(bn1(conv1(x))))))."""

    def __init__(self, channels, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = conv3(channels), norm(channels)
        self.conv2, self.bn2 = conv3(channels), norm(channels)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class TinyResNet(nn.Module):
    """A stem, a block, a strided convolution to twice the channels, a block, a linear layer."""

    def __init__(self, channels=4, classes=3, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem, self.bn = conv3(3, channels), norm(channels)
        self.layer1 = Block(channels, norm)
        self.down, self.down_bn = conv3(channels, 2 * channels, 2), norm(2 * channels)
        self.layer2 = Block(2 * channels, norm)
        self.head = nn.Linear(2 * channels, classes)

    def forward(self, x):
        x = self.layer1(F.relu(self.bn(self.stem(x))))
        x = self.layer2(F.relu(self.down_bn(self.down(x))))
        return self.head(x.mean((2, 3)))


class PreActivation(nn.Module):
    """A stem whose output feeds the first BatchNorm and the identity path."""

    def __init__(self, channels=4):
        super().__init__()
        self.stem = conv3(3, channels)
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv3(channels)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), conv3(channels)
        self.last = nn.BatchNorm2d(channels)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return F.relu(self.last(x)).mean((2, 3))


class TwoParents(nn.Module):
    """One convolution registered under two parents, which call it on different sizes."""

    def __init__(self, channels=3):
        super().__init__()
        shared = conv3(channels, bias=True)
        self.left = nn.Sequential(shared, nn.ReLU())
        self.right = nn.Sequential(nn.AvgPool2d(2), shared)

    def forward(self, x):
        return self.left(x).mean((2, 3)) + self.right(x).mean((2, 3))


class CalledTwice(nn.Module):
    """One convolution called on two sizes, followed by one BatchNorm or by another one each time."""

    def __init__(self, channels=3, norms=1):
        super().__init__()
        self.conv = conv3(channels)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(norms))

    def forward(self, x):
        x = F.relu(self.norms[0](self.conv(x)))
        return self.norms[-1](self.conv(F.max_pool2d(x, 2))).mean((2, 3))


class HeldTwice(TinyResNet):
    """Calls one of its convolutions by way of a list, past whatever takes its place."""

    def __init__(self):
        super().__init__()
        self.held = conv3(self.down.out_channels)
        self.calls = [self.held]

    def forward(self, x):
        x = self.layer1(F.relu(self.bn(self.stem(x))))
        x = self.layer2(F.relu(self.down_bn(self.down(x))))
        return self.head(self.calls[0](x).mean((2, 3)))


class CutUp(TinyResNet):
    """Gives the two halves of every image, all first halves before all second ones, to the network."""

    def forward(self, x):
        return super().forward(torch.cat(x.chunk(2, dim=3))).reshape(2, len(x), -1).mean(0)


class CutLate(TinyResNet):
    """Cuts what the first block gives into halves, as `CutUp` does."""

    def forward(self, x):
        x = self.layer1(F.relu(self.bn(self.stem(x))))
        halves = torch.cat(x.chunk(2, dim=3))
        y = self.layer2(F.relu(self.down_bn(self.down(halves))))
        return self.head(y.mean((2, 3))).reshape(2, len(x), -1).mean(0)


class EvenOdds(nn.Module):
    """Two classes that are as likely as each other on every shifted copy of one image."""

    def __init__(self, image, channels=4):
        super().__init__()
        ring = {"padding": 1, "padding_mode": "circular"}
        self.first = nn.Conv2d(3, channels, 3, **ring)
        self.second = nn.Conv2d(channels, channels, 3, bias=False, **ring)
        self.third = nn.Conv2d(channels, channels, 3, bias=False, **ring)
        self.head = nn.Linear(channels, 2)
        self.double()
        with torch.no_grad():
            self.head.weight.mul_(20)
            self.head.bias -= self(image)[0]

    def forward(self, x):
        x = self.second(self.first(x).tanh()).tanh()
        return self.head(self.third(x).tanh().mean((2, 3)))


class Blind(TinyResNet):
    """A network that is run without gradients."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Probed(TinyResNet):
    """A frozen network with a last layer that learns."""

    def forward(self, x):
        with torch.no_grad():
            x = self.layer1(F.relu(self.bn(self.stem(x))))
            x = self.layer2(F.relu(self.down_bn(self.down(x))))
        return self.head(x.mean((2, 3)))


class Rounding(TinyResNet):
    """A network of which one layer's slopes are all zero."""

    def forward(self, x):
        x = self.layer1(F.relu(self.bn(self.stem(x))))
        x = self.layer2(F.relu(self.down_bn(self.down((64 * x).round() / 64))))
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    """Two convolutions with one weight Parameter, and one with its own."""

    def __init__(self, channels=3):
        super().__init__()
        self.a, self.b, self.c = conv3(channels), conv3(channels), conv3(channels)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(x)))


class TiedAutoencoder(nn.Module):
    """A convolution whose weight the transposed convolution of the decoder also uses."""

    def __init__(self, channels=3):
        super().__init__()
        self.encode = conv3(channels)
        self.decode = nn.ConvTranspose2d(channels, channels, 3, padding=1, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(F.relu(self.encode(x)))


class ReadsAttributes(nn.Module):
    """A host that computes with what it reads off its convolution."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        conv = self.conv
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = conv.kernel_size, conv.stride, conv.padding, conv.dilation
        height = (x.shape[2] + 2 * ph - dh * (kh - 1) - 1) // sh + 1
        width = (x.shape[3] + 2 * pw - dw * (kw - 1) - 1) // sw + 1
        scale = conv.in_channels / (conv.out_channels * conv.groups) + (conv.bias is not None)
        y = conv(x)
        return y.reshape(len(x), conv.out_channels, height, width) * scale


class ReadsWeight(nn.Module):
    """A host that never calls its convolution, but computes with its weight."""

    def __init__(self, channels=3):
        super().__init__()
        self.read, self.called = conv3(channels), conv3(channels)

    def forward(self, x):
        return self.called(F.conv2d(x, self.read.weight.abs(), padding=1))


class Chain(nn.Module):
    """A convolution, something done to its output, a BatchNorm; `after` gets all three tensors."""

    def __init__(self, between, after=lambda x, y, z: z, norm=None, channels=3):
        super().__init__()
        self.conv = conv3(channels)
        self.norm = nn.BatchNorm2d(channels) if norm is None else norm
        self.between, self.after = between, after

    def forward(self, x):
        y = self.conv(x)
        return self.after(x, y, self.norm(self.between(x, y)))


class Raises(nn.Module):
    """A network that refuses every input."""

    def __init__(self, error):
        super().__init__()
        self.conv, self.error = conv3(3), error

    def forward(self, x):
        self.conv(x)
        raise self.error


# Options of 6-channel convolutions: strides, dilations, paddings, groups, even kernels.
GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "padding": (0, 2), "stride": (2, 1)},
    {"kernel_size": 3, "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 4, "padding": 1},
    {"kernel_size": (2, 5), "padding": (3, 1), "stride": (3, 2), "dilation": (2, 1)},
    {"kernel_size": 5, "padding": "valid", "bias": False},
    {"kernel_size": 3, "padding": [2, 1], "padding_mode": "reflect"},
    {"kernel_size": (1, 7), "padding": (0, 3), "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 3, "padding_mode": "replicate", "groups": 2},
    {"kernel_size": 1, "groups": 6},
]


def count_params(model):
    return sum(p.numel() for p in model.parameters())


def hooks_of(model):
    kinds = [key for key in vars(nn.Module()) if "hooks" in key]
    return [(name, key, list(vars(m)[key])) for name, m in model.named_modules() for key in kinds]


def state_of(model):
    """Return everything about a network that finding sites must leave alone."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modes": {name: m.training for name, m in model.named_modules()},
        "tensors": {name: t.detach().clone() for name, t in tensors.items()},
        "ids": {name: id(t) for name, t in tensors.items()},
        "modules": {name: id(m) for name, m in model.named_modules(remove_duplicate=False)},
        "strides": {name: t.stride() for name, t in tensors.items()},
        "gradients": {name: t.requires_grad for name, t in tensors.items()},
        "no gradient was made": all(t.grad is None for t in model.parameters()),
        "hooks": hooks_of(model),
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
    }


def assert_same(before, after):
    tensors = before.pop("tensors"), after.pop("tensors")
    assert before == after
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def converts(*names, method=None):
    """Return a plan without asking anyone."""
    return Plan(groups=(Group(method=method or LinearMix(), sites=names),))


def convert_all_(model, x=None, method=None):
    sites = find_sites(model, photos(1) if x is None else x)
    return replace_(model, make_plan(sites, rules_for(method or LinearMix())))
