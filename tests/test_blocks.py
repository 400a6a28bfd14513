import onnx
import pytest
import torch
from torch import nn
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from torchvision.models.resnet import BasicBlock, Bottleneck

from lcc.blocks import dense
from lcc.counts import count_macs
from lcc.onnx_export import layer_file
from lcc.specs import ConvSpec, Size, StepSpec


def conv(in_channels, out_channels, kernel, groups=1, *, stride=1, bias=False):
    return ConvSpec(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=(kernel, kernel),
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
        groups=groups,
        bias=bias,
    )


BASIC = StepSpec(channels=8, convs=(conv(8, 8, 3),) * 2, norm_params=32, post="relu")
BOTTLENECK = StepSpec(
    channels=16, convs=(conv(16, 4, 1), conv(4, 4, 3), conv(4, 16, 1)), norm_params=48, post="relu"
)
INVERTED = StepSpec(
    channels=8,
    convs=(conv(8, 24, 1), conv(24, 24, 3, groups=24), conv(24, 8, 1)),
    squeeze=(conv(24, 8, 1, bias=True), conv(8, 24, 1, bias=True)),
    norm_params=2 * (24 + 24 + 8),
)
BRANCHES = StepSpec(channels=8, convs=(conv(8, 4, 1), conv(8, 6, 1), conv(10, 8, 1)), norm_params=20)
CHANGING = StepSpec(
    channels=16,
    in_channels=8,
    stride=(2, 2),
    convs=(conv(8, 16, 3, stride=2), conv(16, 16, 3)),
    shortcut=(conv(8, 16, 1, stride=2),),
    norm_params=96,
    post="relu",
)
POOLED = CHANGING.model_copy(update={"shortcut": (conv(8, 16, 1),)})
INVERTED_CHANGING = StepSpec(
    channels=16,
    in_channels=8,
    stride=(2, 2),
    convs=(conv(8, 24, 1), conv(24, 24, 3, groups=24, stride=2), conv(24, 16, 1)),
    squeeze=INVERTED.squeeze,
    norm_params=2 * (24 + 24 + 16),
)
PREACTIVATED = BASIC.model_copy(update={"pre_norm": True, "post": None})


class PreActivated(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False)),
            *(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False)),
        )

    def forward(self, x):
        return x + self.layers(x)


def inverted(channels=8, stride=1):
    config = InvertedResidualConfig(
        8, 3, 24, channels, use_se=True, activation="RE", stride=stride, dilation=1, width_mult=1
    )
    return InvertedResidual(config, nn.BatchNorm2d)


def changing(*first, stride=2):
    projection = nn.Sequential(*first, nn.Conv2d(8, 16, 1, stride, bias=False), nn.BatchNorm2d(16))
    return BasicBlock(8, 16, 2, projection)


ORIGINALS = {
    "basic": (BASIC, lambda: BasicBlock(8, 8)),
    "bottleneck": (BOTTLENECK, lambda: Bottleneck(16, 4)),
    "inverted": (INVERTED, inverted),
    "pre-activated": (PREACTIVATED, PreActivated),
    "changing": (CHANGING, changing),
    "pooled": (POOLED, lambda: changing(nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), stride=1)),
    "inverted and changing": (INVERTED_CHANGING, lambda: inverted(16, 2)),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_block_holds_the_same_work_as_its_original(name):
    spec, original = ORIGINALS[name]
    example = torch.randn(2, spec.channels_in, 6, 6)
    counted = [
        (
            sum(p.numel() for p in block.parameters()),
            count_macs(block, example).macs,
            op_counts(block, example),
        )
        for block in (dense(spec), original())
    ]
    assert counted[0] == counted[1]


def op_counts(block, example):
    """How often each operation is in the block's ONNX file; the two gates are the same to the clock."""
    types = [node.op_type for node in onnx.load_from_string(layer_file(block, example)).graph.node]
    types = ["Sigmoid" if kind == "HardSigmoid" else kind for kind in types]
    return {kind: types.count(kind) for kind in set(types) - {"ReduceMean", "GlobalAveragePool"}}


@pytest.mark.parametrize("spec", [BRANCHES, INVERTED.model_copy(update={"squeeze": (conv(5, 9, 1),)})])
def test_a_step_that_is_no_chain_keeps_its_parameters_and_its_shape(spec):
    block, x = dense(spec), torch.randn(2, 8, 5, 6)
    assert block(x).shape == x.shape
    assert sum(p.numel() for p in block.parameters()) == spec.params


@pytest.mark.parametrize("size", [(6, 6), (7, 5)])
@pytest.mark.parametrize("spec", [CHANGING, POOLED, INVERTED_CHANGING], ids=str)
def test_a_stage_changing_block_gives_the_size_that_is_stated(spec, size):
    out = spec.out_size(Size(height=size[0], width=size[1]))
    assert dense(spec)(torch.randn(2, 8, *size)).shape == (2, spec.channels, out.height, out.width)


def test_a_convolution_is_built_as_it_is_described():
    spec = ConvSpec(
        in_channels=4, out_channels=6, kernel_size=(3, 5), stride=(2, 1), padding=(1, 2), groups=2, bias=True
    )
    size = Size(height=9, width=8)
    built = dense(spec)(torch.randn(1, 4, 9, 8))
    assert (built.shape[2], built.shape[3]) == (spec.out_size(size).height, spec.out_size(size).width)
    assert sum(p.numel() for p in dense(spec).parameters()) == spec.params
