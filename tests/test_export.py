import copy
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from stand_in import Scaled, StandIn, approximating
from torch import nn

from lcc.errors import ArtifactError, CheckFailedError, RecipeError, SourceError
from lcc.export import to_onnx
from lcc.methods.linear_mix import LinearMix
from lcc.models import Loaded, Preprocessing, Source
from lcc.onnx_export import layer_file
from lcc.onnx_runtime import Session
from lcc.ops.wrap import wrap_pad
from lcc.plan import Group, Plan
from lcc.specs import ConvSpec

SQUARE = ConvSpec(in_channels=8, out_channels=8, kernel_size=(3, 3), padding=(1, 1))
STRIDED = ConvSpec(in_channels=8, out_channels=16, kernel_size=(3, 3), padding=(1, 1), stride=(2, 2))


class Network(nn.Module):
    """A small residual network with operators: one in a residual block, one with a cross, one that widens."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1, self.bn1 = LinearMix().build(SQUARE), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = LinearMix(stencil="cross").build(SQUARE), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = LinearMix(change_channels=True).build(STRIDED), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)
        for norm in (self.stem[1], self.bn1, self.bn2, self.bn3):
            for tensor in (norm.running_var, norm.weight.data):
                tensor.uniform_(0.5, 2)
            for tensor in (norm.running_mean, norm.bias.data):
                tensor.normal_()

    def forward(self, x):
        x = self.stem(x)
        y = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(y)))
        x = torch.relu(self.bn3(self.conv3(x)))
        return self.fc(x.mean((2, 3)))


def loaded(model):
    return Loaded(
        model=model,
        source=Source(id="zoo:tiny", weights="none"),
        preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.2,) * 3, image_size=(10, 12)),
        class_names=("a", "b", "c", "d", "e"),
    )


PLAN = Plan(groups=(Group(method=LinearMix(), sites=("conv1",)),))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture(scope="module")
def exported(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "tiny.onnx"
    return path, to_onnx(loaded(network), path, PLAN)


def test_the_file_computes_what_torch_computes_at_any_batch(network, exported):
    session = Session(exported[0])
    for batch in (1, 3, 5):
        images = torch.randn(batch, 3, 10, 12, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            wanted = network(images).numpy()
        (got,) = session.run({"input": images.numpy()})
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_the_result_says_how_close_it_is_at_batch_1_and_3(exported):
    path, result = exported
    assert [entry.batch for entry in result.parity] == [1, 3]
    assert all(entry.relative_error < result.tolerance == 1e-4 for entry in result.parity)
    assert [entry.top1_agreement for entry in result.parity] == [1, 1]
    assert result.size_bytes == path.stat().st_size


def test_the_graph_is_convolutions_sums_and_activations_only(exported):
    types = [node.op_type for node in onnx.load(exported[0]).graph.node]
    assert "BatchNormalization" not in types
    # The stem; two convolutions for each operator, one more where it doubles the channels.
    assert types.count("Conv") == 1 + 2 + 2 + 3


def test_the_metadata_says_what_the_file_is(exported):
    metadata = Session(exported[0]).metadata
    assert Plan.model_validate_json(metadata["lcc.plan"]) == PLAN
    assert Preprocessing.model_validate_json(metadata["lcc.preprocessing"]).image_size == (10, 12)
    assert Source.model_validate_json(metadata["lcc.source"]).id == "zoo:tiny"
    assert json.loads(metadata["lcc.class_names"]) == ["a", "b", "c", "d", "e"]
    assert {"lcc", "torch", "onnx", "onnxscript", "onnxruntime"} == json.loads(
        metadata["lcc.versions"]
    ).keys()
    assert (metadata["lcc.format"], metadata["lcc.image_size"]) == ("lcc/1", "10x12")


def test_the_file_tells_nothing_of_the_machine_it_was_made_on(exported):
    data = exported[0].read_bytes()
    here = {str(Path(__file__).parent.parent), str(Path(torch.__file__).parent.parent), str(Path.home())}
    assert [path for path in here if path.encode() in data] == []
    assert b"stack_trace" not in data
    assert onnx.load(exported[0]).opset_import[0].version == 20


def test_the_network_itself_is_left_as_it_is(exported, network):
    assert isinstance(network.conv2.spatial.weight, nn.Parameter)
    assert network.conv2.spatial.weight.shape == (8, 1, 5)  # still a cross, not lowered
    assert isinstance(network.bn1, nn.BatchNorm2d)


def test_half_precision_halves_the_file_and_keeps_float32_inputs_and_outputs(
    exported, network, tmp_path, capfd
):
    path = tmp_path / "half.onnx"
    result = to_onnx(loaded(network), path, PLAN, half=True)
    weights = [tensor for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 4]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.FLOAT16}
    session = Session(path)
    assert session.run(session.example(2))[0].dtype == np.float32
    assert session.precision == "float16, inputs and outputs float32"
    assert 1e-6 < result.parity[0].relative_error < result.tolerance
    assert capfd.readouterr() == ("", "")


class Frozen(nn.Module):
    """A network that takes any batch, until it is exported."""

    def forward(self, x):
        return (x.view(2, 3, -1) if torch.compiler.is_exporting() else x.flatten(2)).mean(2)


class Different(nn.Module):
    """A network that computes something else when it is exported."""

    def forward(self, x):
        return x.mean((2, 3)) * (1.01 if torch.compiler.is_exporting() else 1.0)


@pytest.mark.parametrize("kind", [Frozen, Different])
def test_a_file_that_fails_its_check_is_not_kept_and_replaces_nothing(kind, tmp_path, capfd):
    path = tmp_path / "model.onnx"
    path.write_text("the last good one")
    with pytest.raises(CheckFailedError) as caught:
        to_onnx(loaded(kind().eval()), path, Plan())
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (3, False)
    assert path.read_text() == "the last good one"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("target", ["missing/model.onnx", "."])
def test_an_unwritable_target_is_one_line_before_any_work(target, tmp_path):
    with pytest.raises(ArtifactError, match="can't be written") as caught:
        to_onnx(loaded(None), tmp_path / target, Plan())
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_images_that_the_network_can_not_take_are_one_line(tmp_path):
    with pytest.raises(SourceError, match="1x3x10x12"):
        to_onnx(loaded(nn.Conv2d(4, 4, 1)), tmp_path / "model.onnx", Plan())
    assert list(tmp_path.iterdir()) == []


def test_an_opset_that_the_exporter_can_not_write_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="opset 17"):
        to_onnx(loaded(None), tmp_path / "model.onnx", Plan(), opset=17)


def with_operator(lowered):
    """A network of a convolution to 4 channels and one operator with these lowerings."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), StandIn(lowered), nn.AdaptiveAvgPool2d(2)).eval()


def test_what_approximating_costs_is_reported_apart_from_what_onnx_runtime_adds(tmp_path):
    network = with_operator(approximating(5e-4))
    result = to_onnx(loaded(network), tmp_path / "model.onnx", PLAN)
    assert result.lowered == {"1": "off by 0.0005"}
    assert result.lowering_error == pytest.approx(5e-4, rel=0.01)
    assert all(entry.relative_error < 1e-5 for entry in result.parity)
    metadata = Session(tmp_path / "model.onnx").metadata
    assert json.loads(metadata["lcc.lowering"]) == {"1": "off by 0.0005"}
    images = torch.randn(1, 3, 10, 12)
    (got,) = Session(tmp_path / "model.onnx").run({"input": images.numpy()})
    wanted = (network[2](network[1](network[0](images)) * 1.0005)).detach().numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


def test_nothing_is_said_of_lowering_where_operators_are_exported_as_they_are(exported):
    assert (exported[1].lowered, exported[1].lowering_error) == ({}, None)
    assert "lcc.lowering" not in Session(exported[0]).metadata


def test_the_tolerance_of_lowering_decides_which_way_is_taken(tmp_path):
    network = loaded(with_operator(approximating(5e-3, 4e-4)))
    result = to_onnx(network, tmp_path / "model.onnx", PLAN, lowering_tolerance=1e-4)
    assert result.lowered == {"1": "off by 0.0004, past the tolerance of 1e-04"}


def test_a_lowering_that_is_said_to_be_exact_and_is_not_fails_the_check(tmp_path):
    network = with_operator(lambda op, size: [(Scaled(op.conv, 1.01), "exact")])
    with pytest.raises(CheckFailedError, match=r"changed the outputs by 1\.0e-02"):
        to_onnx(loaded(network), tmp_path / "model.onnx", PLAN)
    assert list(tmp_path.iterdir()) == []


class Fourier(nn.Module):
    """A Fourier transform of the rows, and back."""

    def forward(self, x):
        return torch.fft.rfft(x).abs()


def test_a_fourier_transform_left_in_an_operator_fails_the_check_and_names_it(tmp_path):
    network = with_operator(lambda op, size: [(nn.Sequential(copy.deepcopy(op.conv), Fourier()), "", 0.1)])
    with pytest.raises(CheckFailedError, match=r"^1 was lowered to a Fourier transform"):
        to_onnx(loaded(network), tmp_path / "model.onnx", PLAN, lowering_tolerance=1)
    assert list(tmp_path.iterdir()) == []


def test_a_fourier_transform_of_the_host_is_its_own_affair(tmp_path):
    network = nn.Sequential(*with_operator(None), Fourier()).eval()
    to_onnx(loaded(network), tmp_path / "model.onnx", PLAN)
    types = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert "DFT" in types


def test_images_of_another_size_are_refused_with_the_size_that_is_wanted(exported):
    session = onnxruntime.InferenceSession(str(exported[0]), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [3, 10, 12]
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="Expected: 12"):
        session.run(None, {"input": np.zeros((1, 3, 10, 13), np.float32)})


def test_periodic_padding_below_opset_19_is_refused_and_leaves_no_file(tmp_path):
    class Padded(nn.Module):
        def forward(self, x):
            return wrap_pad(x, (1, 1, 1, 1))

    with pytest.raises(RecipeError, match="opset 19 or later"):
        to_onnx(loaded(Padded().eval()), tmp_path / "model.onnx", PLAN, opset=18)
    assert list(tmp_path.iterdir()) == []


class ExplicitStep(nn.Module):
    """A reaction-diffusion step as it is lowered: relu(K2 K1 y + (relu(N(M y)) + y)), K1 and K2 depthwise."""

    def __init__(self, channels):
        super().__init__()
        self.spread = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.gather = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.mix, self.norm = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.norm.running_mean.normal_()

    def forward(self, y):
        reaction = torch.relu(self.norm(self.mix(y)))
        return torch.relu(self.gather(self.spread(y)) + (reaction + y))


def test_an_explicit_step_runs_as_three_convolutions_and_one_addition(tmp_path):
    steps = nn.Sequential(nn.Conv2d(16, 32, 1), ExplicitStep(32), ExplicitStep(32), nn.AdaptiveAvgPool2d(1))
    data = layer_file(steps, torch.randn(1, 16, 14, 14))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4  # it warns that the result is for this processor
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    if not any(node.domain == "com.microsoft.nchwc" for node in nodes):
        pytest.skip("ONNX Runtime has no blocked convolutions for this processor, and fuses less")
    types = [node.op_type for node in nodes]
    assert types.count("Conv") == 1 + 2 * 3
    assert types.count("Add") == 2
    assert not {"Relu", "BatchNormalization"} & set(types)
