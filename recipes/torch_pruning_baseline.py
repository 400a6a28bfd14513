"""Channel pruning by the torch-pruning package, trained as lcc's recipes train: a rival to compare with.

python recipes/torch_pruning_baseline.py recipes/cifar10-resnet20-budget.toml 2.1 -o pruned

Prunes the network that the recipe names, an lcc directory, to so many times fewer MACs (ranked by the L2
norm of groups, a few channels at a time), trains it as the recipe's [finetune] says with the unpruned
network as the teacher, and writes OUT.onnx, and OUT.json: its costs and its accuracy by epoch. `--resume`
goes on, `--set` is that of `lcc run`. Needs `pip install torch-pruning`.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import torch_pruning as tp

import lcc
from lcc import artifact, train
from lcc.counts import count_macs, count_params
from lcc.export import to_onnx
from lcc.plan import Plan
from lcc.recipe_file import load


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
    for _ in range(steps):
        pruner.step()
        if count_macs(model, example).macs <= wanted:
            return model
    raise SystemExit(f"torch-pruning does not get to {ratio:g} times fewer MACs")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("ratio", type=float)
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    recipe = load(given.recipe, tuple(given.set))
    if recipe.finetune is None:
        parser.error(f"{given.recipe}: has no [finetune]")
    loaded = artifact.load(recipe.model.source).loaded
    example = torch.randn(1, len(loaded.preprocessing.mean), *loaded.preprocessing.image_size)
    model = pruned(loaded.model, example, given.ratio)
    checkpoints = Path(f"{given.out}.checkpoints")
    result = train.finetune(
        model,
        loaded.preprocessing,
        recipe.finetune,
        teacher=loaded.model,
        checkpoint_dir=checkpoints,
        resume=given.resume,
        workers=0,
    )
    to_onnx(replace(loaded, model=model), Path(f"{given.out}.onnx"), Plan())
    numbers = {
        "versions": {"lcc": lcc.__version__, "torch_pruning": tp.__version__, "torch": torch.__version__},
        "macs": count_macs(model, example).macs,
        "params": count_params(model),
        "top1_by_epoch": [epoch.accuracy.top1 for epoch in result.history],
    }
    Path(f"{given.out}.json").write_text(json.dumps(numbers, indent=2) + "\n")
    shutil.rmtree(checkpoints)


if __name__ == "__main__":
    main()
