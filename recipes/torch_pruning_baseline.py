"""Channel pruning by the torch-pruning package, trained as lcc's recipes train: a rival to compare with.

python recipes/torch_pruning_baseline.py runs/cifar10-resnet20-dense imagefolder:data/cifar10 2.1 --seed 0

Prunes an lcc directory's dense network to so many times fewer MACs (ranked by the L2 norm of groups, a
few channels at a time), trains it with the unpruned network as the teacher, and prints its accuracy by epoch,
its costs, and its latency in ONNX Runtime beside the dense network's. Needs `pip install torch-pruning`.
"""

from __future__ import annotations

import argparse
import copy
import json

import torch
import torch_pruning as tp

import lcc
from lcc import artifact, train
from lcc.counts import count_macs, count_params
from lcc.measure import bench_onnx
from lcc.onnx_export import export_graph, to_file
from lcc.recipe import Finetune

OPSET = 20
ROUNDS = 15


def pruned(model: torch.nn.Module, example: torch.Tensor, ratio: float, steps: int = 200) -> torch.nn.Module:
    """Return a copy with at least `ratio` times fewer MACs; the classifier's outputs stay."""
    model = copy.deepcopy(model).eval()
    heads = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    pruner = tp.pruner.MagnitudePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=0.95,
        iterative_steps=steps,
        ignored_layers=heads,
    )
    wanted = count_macs(model, example).macs / ratio
    while count_macs(model, example).macs > wanted:
        pruner.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory")
    parser.add_argument("data")
    parser.add_argument("ratio", type=float)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    loaded, _, _ = artifact.load(given.directory)
    teacher = loaded.model
    example = torch.randn(1, len(loaded.preprocessing.mean), *loaded.preprocessing.image_size)
    model = pruned(teacher, example, given.ratio)
    options = Finetune(
        data=given.data,
        epochs=given.epochs,
        lr=given.lr,
        distill=0.9,
        precision="bf16",
        channels_last=True,
        seed=given.seed,
    )
    result = train.finetune(model, loaded.preprocessing, options, teacher=teacher, workers=1)
    two = torch.cat([example, example])
    files = {
        name: to_file(export_graph(network.float().eval(), two, OPSET))
        for name, network in (("dense", teacher), ("pruned", model))
    }
    bench = bench_onnx(files, rounds=ROUNDS)
    print(
        json.dumps(
            {
                "lcc": lcc.__version__,
                "torch_pruning": tp.__version__,
                "macs": [count_macs(network, example).macs for network in (teacher, model)],
                "params": [count_params(network) for network in (teacher, model)],
                "top1_by_epoch": [epoch.accuracy.top1 for epoch in result.history],
                "ms": {name: latency.median_ms for name, latency in bench.latencies.items()},
                "speedup": bench.speedups["pruned"].model_dump(),
                "conditions": str(bench.conditions),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
