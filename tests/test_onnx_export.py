import onnx
import pytest
import torch
from hosts import seeded
from torch import nn
from torch.nn import functional as F

from lcc.onnx_export import export_graph, to_file
from lcc.onnx_runtime import Session


class Kernel(nn.Module):
    """A convolution with a kernel from outside, and with a scale of its own or without."""

    def __init__(self, weight, bias, scale):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.scale = nn.Parameter(torch.linspace(-1, 1.5, len(weight))) if scale else None

    def forward(self, x):
        y = F.conv2d(x, self.weight, self.bias, padding=1)
        return y if self.scale is None else y * self.scale[:, None, None]


class Shared(nn.Module):
    """Residual blocks whose convolutions have one kernel and one bias; BatchNorms are private."""

    def __init__(self, channels=8, blocks=3, *, scale=False, bias=False):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        first = nn.Conv2d(channels, channels, 3, bias=bias)
        self.convs = nn.ModuleList(Kernel(first.weight, first.bias, scale) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(blocks))
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + F.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


class SharedSums(nn.Module):
    """Sums of a depthwise and a pointwise convolution, both kernels shared, each followed by a BatchNorm."""

    def __init__(self, channels=8):
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))

    def forward(self, x):
        for norm in self.norms:
            x = F.relu(x + norm(self.spatial(x) + self.pointwise(x)))
        return x


def exported(model, size=8, channels=3):
    """Return the graph of a network, and how far ONNX Runtime is from torch, over the largest output."""
    example = torch.randn(2, channels, size, size)
    data = to_file(export_graph(model, example, 20))
    with torch.no_grad():
        wanted = model(example).numpy()
    (got,) = Session(data).run({"input": example.numpy()})
    return onnx.load_from_string(data).graph, abs(got - wanted).max() / abs(wanted).max()


def kernels(graph, dims=4):
    return [i for i in graph.initializer if len(i.dims) == dims]


def readers_of(graph, op_type, index=1):
    return [node.input[index] for node in graph.node if node.op_type == op_type]


# 576 numbers, which the exporter's optimiser merges where they are equal, and 2304, which it leaves alone
@pytest.mark.parametrize(("channels", "bias"), [(8, True), (16, False)])
def test_a_kernel_of_several_layers_is_one_initializer_and_its_batch_norms_stay(channels, bias):
    graph, error = exported(seeded(Shared, channels, bias=bias).float())
    assert sorted(i.dims[1] for i in kernels(graph)) == [3, channels]
    names = readers_of(graph, "Conv")
    assert names[1:] == [names[1]] * 3
    assert len(readers_of(graph, "BatchNormalization")) == 3
    assert error < 1e-5


@pytest.mark.parametrize("channels", [8, 16])
def test_kernels_that_are_only_equal_take_in_their_batch_norms(channels):
    model = seeded(Shared, channels).float()
    for conv in model.convs[1:]:
        conv.weight = nn.Parameter(conv.weight.detach().clone())
    graph, error = exported(model)
    assert [node.op_type for node in graph.node].count("BatchNormalization") == 0
    assert len(kernels(graph)) == 4
    assert error < 1e-5


def test_an_equal_kernel_that_is_not_tied_is_folded_and_leaves_the_tied_ones_tied():
    model = seeded(Shared).float()
    model.convs[0].weight = nn.Parameter(model.convs[0].weight.detach().clone())
    graph, error = exported(model)
    assert len(kernels(graph)) == 3
    assert len(set(readers_of(graph, "Conv")[2:])) == 1
    assert len(readers_of(graph, "BatchNormalization")) == 2
    assert error < 1e-5


def test_private_scales_of_a_shared_kernel_cost_no_node():
    graph, error = exported(seeded(Shared, scale=True).float())
    assert "Mul" not in {node.op_type for node in graph.node}
    assert len(kernels(graph)) == 2
    assert error < 1e-5


def test_a_layer_that_is_called_several_times_is_one_initializer_each():
    graph, error = exported(seeded(SharedSums).float(), channels=8)
    assert len(kernels(graph)) == 2
    assert error < 1e-5


def test_onnx_runtime_has_no_batch_norm_left_to_compute_in_a_sum_of_shared_kernels(tmp_path):
    import onnxruntime

    model = seeded(SharedSums).float()
    data = to_file(export_graph(model, torch.randn(2, 8, 8, 8), 20))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    types = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert types.count("Conv") == 6
    assert "BatchNormalization" not in types


@pytest.mark.parametrize("scale", [False, True])
def test_the_file_of_a_shared_network_is_as_large_as_its_distinct_numbers(scale):
    model = seeded(Shared, 48, 8, scale=scale).float()
    held = [*model.parameters(), *(b for n, b in model.named_buffers() if "num_batches" not in n)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert 95_000 < size < 110_000
    data = to_file(export_graph(model, torch.randn(2, 3, 8, 8), 20))
    assert size * 0.95 <= len(data) <= size * 1.05
