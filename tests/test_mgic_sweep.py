"""Multigrid in channels on whole networks of torchvision, timm and the zoo: counts, files, parity. Slow."""

from __future__ import annotations

import pytest

from lcc import artifact
from lcc.conversion import convert_network
from lcc.counts import count_params, fvcore_macs
from lcc.export import to_onnx
from lcc.methods.mgic import Mgic
from lcc.network import open_network
from lcc.plan import rules_for
from lcc.recipe import ModelPart
from lcc.settings import Settings

pytestmark = pytest.mark.zoo

BLOCKS = Mgic(group_size=8, coarsest=8, transitions=True)
SMALL = (64, 64)
NETWORKS = {
    "torchvision:mobilenet_v2": BLOCKS,
    "torchvision:mobilenet_v3_large": BLOCKS,
    "torchvision:efficientnet_b0": BLOCKS,
    "timm:mobilenetv2_100": BLOCKS,
    "timm:mobilenetv3_large_100": BLOCKS,
    "timm:efficientnet_b0": BLOCKS,
    "torchvision:resnet18": BLOCKS,
    "torchvision:resnet50": BLOCKS,
    "zoo:cifar_resnet20": Mgic(group_size=4, coarsest=8, transitions=True),
    "zoo:convmixer_256_16": Mgic(form="conv"),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("source", NETWORKS)
def test_a_network_is_converted_counted_stored_and_exported(source, tmp_path):
    method = NETWORKS[source]
    size = None if source.startswith("zoo") else SMALL
    original = open_network(ModelPart(source=source, weights="none", image_size=size))
    settings = Settings()
    sites, converted = convert_network(original, rules_for(method), None, settings, fits=tmp_path / "fits")
    model = converted.loaded.model
    saved = sum(row.before.params - row.after.params for row in converted.row(sites=sites).layers)
    assert count_params(model) == count_params(original.loaded.model) - saved
    row = converted.row(sites=sites)
    assert row.macs == fvcore_macs(model, converted.example).macs
    assert row.macs < original.row().macs
    artifact.save(converted.loaded, tmp_path / "dir", plan=converted.plan)
    again = artifact.load(tmp_path / "dir").loaded
    assert count_params(again.model) == count_params(model)
    exported = to_onnx(again, tmp_path / "model.onnx", converted.plan)
    assert [entry.batch for entry in exported.parity] == [1, 3]
    assert max(entry.relative_error for entry in exported.parity) < 1e-4
