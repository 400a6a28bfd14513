import numpy as np
import pytest
import torch
from onnx_graphs import op_types
from onnxscript import ir
from torch import nn

from lcc.errors import RecipeError
from lcc.onnx_export import export_graph
from lcc.onnx_runtime import Session
from lcc.ops.wrap import wrap_pad

PADS = [(0, 0, 0, 0), (1, 2, 3, 4), (0, 3, 1, 0), (5, 0, 0, 7), (4, 4, 6, 6), (5, 5, 7, 7)]


class Padded(nn.Module):
    def __init__(self, pads):
        super().__init__()
        self.pads = pads

    def forward(self, x):
        return wrap_pad(x, self.pads)


def periodic(x, pads):
    """The padded image from its definition: pixel (i, j) is the one at i mod H, j mod W."""
    top, bottom, left, right = pads
    height, width = x.shape[2:]
    rows, columns = np.arange(-top, height + bottom) % height, np.arange(-left, width + right) % width
    return x[:, :, rows][..., columns]


@pytest.mark.parametrize("pads", PADS)
def test_padding_goes_on_periodically(pads):
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    np.testing.assert_array_equal(wrap_pad(x, pads).numpy(), periodic(x.numpy(), pads))


def test_gradients_go_through_the_padding():
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: wrap_pad(x, (1, 2, 3, 0)), (x,))


def exported(channels, pads, opset=20):
    return export_graph(Padded(pads).eval(), torch.randn(2, channels, 5, 7), opset)


@pytest.mark.parametrize(("channels", "kind"), [(3, "Pad"), (4, "Conv")])
@pytest.mark.parametrize("pads", PADS[1:])
def test_padding_exports_as_one_node_for_any_batch(channels, kind, pads):
    model = exported(channels, pads)
    assert op_types(model) == [kind]
    session = Session(ir.to_proto(model).SerializeToString())
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, channels, 5, 7)).astype(np.float32)
        np.testing.assert_array_equal(session.run({"input": x})[0], periodic(x, pads))


def test_an_opset_that_does_not_have_it_is_refused_with_the_one_that_has():
    with pytest.raises(RecipeError, match="opset 19"):
        exported(3, (1, 1, 1, 1), opset=18)
    assert op_types(exported(4, (1, 1, 1, 1), opset=18)) == ["Conv"]
