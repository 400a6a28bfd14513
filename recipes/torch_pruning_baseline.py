"""Channel pruning by the torch-pruning package, trained as lcc's recipes train: a rival to compare with.

python recipes/torch_pruning_baseline.py recipes/cifar10-resnet20-budget.toml 2.1 -o pruned

Prunes the network that the recipe names, an lcc directory, to so many times fewer MACs, a few channels
at a time. Channels are ranked by the L2 norms of their groups, among groups of one shape (isomorphic
pruning, of the package's authors, arXiv:2407.04616), or with `--rank global` all together, which starves
the narrow first stage. The 1x1 convolutions that stand for padding shortcuts count there, by their ones.
Trains what is left as the recipe's [finetune] says, with the unpruned network as the teacher, and writes
OUT.onnx, and OUT.json: its costs and its accuracy by epoch. `--resume` goes on, `--set` is that of `lcc
run`. Needs `pip install torch-pruning`.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

import lcc
from lcc import artifact, checkpoints, train
from lcc.counts import count_macs, count_params
from lcc.export import to_onnx
from lcc.plan import Plan
from lcc.recipe_file import load
from lcc.written_files import written_at_once
from lcc.zoo import Subsample


class Picked(nn.Module):
    """A `Subsample` after pruning: every second pixel, the channels left at their places, zeros elsewhere.

    (N, C, H, W) -> (N, len(places), ceil(H / 2), ceil(W / 2)). `places`: which channel comes there, or C.
    """

    def __init__(self, places: Tensor) -> None:
        super().__init__()
        self.register_buffer("places", places)

    def forward(self, x: Tensor) -> Tensor:
        """Return the smaller x, its channels at their places."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 1)).index_select(1, self.places)


def with_convolutions(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy in which each `Subsample` is a 1x1 convolution that computes the same.

    torch-pruning takes a pad for an operation that leaves channels where they are: it would prune the same
    ones before and behind it, and add those that are left to the wrong ones. It knows convolutions.
    """
    model, seen = copy.deepcopy(model).eval(), {}
    places = {name: module for name, module in model.named_modules() if isinstance(module, Subsample)}
    for name, module in places.items():
        module.register_forward_hook(lambda _, given, __, name=name: seen.update({name: given[0].shape[1]}))
    model(example)
    for name, module in places.items():
        count, margin = seen[name], module.margin
        conv = nn.Conv2d(count, count + 2 * margin, 1, stride=2, bias=False)
        conv.weight.data = F.pad(torch.eye(count), (0, 0, margin, margin))[:, :, None, None]
        model.set_submodule(name, conv)
    return model


def without_convolutions(model: nn.Module, names: list[str]) -> nn.Module:
    """Return a copy in which these 1x1 convolutions, of zeros and ones, only move channels."""
    model = copy.deepcopy(model)
    for name in names:
        weight = model.get_submodule(name).weight.data[:, :, 0, 0]
        places = torch.where(weight.any(1), weight.argmax(1), weight.shape[1])
        model.set_submodule(name, Picked(places))
    return model


def pruned(
    model: nn.Module, example: Tensor, ratio: float, *, isomorphic: bool = True, steps: int = 200
) -> nn.Module:
    """Return a copy with at least `ratio` times fewer MACs; the classifier's outputs stay."""
    shortcuts = [name for name, module in model.named_modules() if isinstance(module, Subsample)]
    known = with_convolutions(model, example)
    pruner = tp.pruner.MagnitudePruner(
        known,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        isomorphic=isomorphic,
        pruning_ratio=0.95,
        iterative_steps=steps,
        ignored_layers=[module for module in known.modules() if isinstance(module, nn.Linear)],
    )
    wanted = count_macs(model, example).macs / ratio
    for _ in range(steps):
        pruner.step()
        found = without_convolutions(known, shortcuts)
        if count_macs(found, example).macs <= wanted:
            return found
    raise SystemExit(f"torch-pruning does not get to {ratio:g} times fewer MACs")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("ratio", type=float)
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--rank", choices=["isomorphic", "global"], default="isomorphic")
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
    model = pruned(loaded.model, example, given.ratio, isomorphic=given.rank == "isomorphic")
    kept = Path(f"{given.out}.checkpoints")
    result = train.finetune(
        model,
        loaded.preprocessing,
        recipe.finetune,
        teacher=loaded.model,
        checkpoint_dir=kept,
        resume=given.resume,
        workers=0,
    )
    to_onnx(replace(loaded, model=model), Path(f"{given.out}.onnx"), Plan())
    numbers = {
        "ratio": given.ratio,
        "rank": given.rank,
        "options": recipe.finetune.model_dump(mode="json"),
        "precision": result.precision,
        "versions": {"lcc": lcc.__version__, "torch_pruning": tp.__version__, "torch": torch.__version__},
        "macs": count_macs(model, example).macs,
        "params": count_params(model),
        "top1_by_epoch": [epoch.accuracy.top1 for epoch in result.history],
    }
    with written_at_once(Path(f"{given.out}.json")) as path:
        path.write_text(json.dumps(numbers, indent=2) + "\n")
    checkpoints.discard(kept)


if __name__ == "__main__":
    main()
