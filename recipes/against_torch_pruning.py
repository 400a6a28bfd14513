"""lcc beside the torch-pruning package: the same files, epochs, teacher and seeds, in one table.

python recipes/against_torch_pruning.py -o runs/against --networks 20 32 --ratios 2.1 2.6 --seeds 0 1 2

Run it in a folder with data/ and weights/ as cifar10-resnet20-dense.toml says. For every network and
seed, the dense network is fine-tuned (`dense`). It then teaches the others, which all get as many epochs
again, all as cifar10-resnet20-budget.toml says: itself (`again`), lcc's plan for each ratio (`lcc-2.1`),
and torch-pruning's network (`pruned-2.1`; with `--rows global-2.1`, too, as its weaker ranking leaves
it). All are timed together in ONNX Runtime; the table is printed, and kept in OUT/table.md. It goes on
where it was stopped, on the same terms. `--jobs` trains so many at once; `--rows` trains some rows only.
A row takes 20 to 40 minutes on one CPU core. Needs `pip install torch-pruning`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from lcc import artifact
from lcc.counts import count_macs, count_params
from lcc.export import to_onnx
from lcc.measure import bench_onnx
from lcc.recipe_file import load

HERE = Path(__file__).parent
BUDGET = HERE / "cifar10-resnet20-budget.toml"
WEIGHTS = {20: "weights/resnet20-12fca82f.th", 32: "weights/resnet32-d509ac18.th"}
ROUNDS = 30
PRUNED = {"pruned": "isomorphic", "global": "global"}  # how torch-pruning ranks


def command(row: str, folder: Path, layers: int, seed: int, given: argparse.Namespace) -> list[str]:
    """Return the command that trains a row."""
    kind, _, ratio = row.partition("-")
    dense = f'model.source="{folder / "dense"}"'
    terms = [f"finetune.seed={seed}", f"finetune.epochs={given.epochs}"]
    if kind == "dense":
        terms += [f'model.source="{WEIGHTS[layers]}"', f'model.arch="zoo:cifar_resnet{layers}"']
        words = ["lcc", "run", f"{HERE}/cifar10-resnet20-dense.toml"]
    elif kind == "lcc":
        target = f'budget.targets=["macs={100 / float(ratio):.2f}%"]'
        terms += [dense, target, f'teacher.source="{folder / "dense"}"']
        words = ["lcc", "run", f"{BUDGET}"]
    elif kind in PRUNED:
        terms += [dense]
        words = [sys.executable, f"{HERE}/torch_pruning_baseline.py", f"{BUDGET}", ratio]
        words += ["--rank", PRUNED[kind]]
    else:
        tune = load(BUDGET, tuple(terms)).finetune.model_dump(mode="json", exclude_defaults=True)
        data = tune.pop("data")
        terms = [f"{key}={json.dumps(value)}" for key, value in tune.items()]
        words = ["lcc", "finetune", f"{folder / 'dense'}", f"--teacher={folder / 'dense'}", f"--data={data}"]
    options = ["-o", f"{folder / row}", "--threads", f"{given.threads}", "--resume"]
    if kind not in PRUNED:
        options += ["--workers", "0"]
    if words[1] == "run":
        options += ["--no-latency"]
    return [*words, *options, *(f"--set={term}" for term in terms)]


def terms_of(words: list[str]) -> str:
    """Return what a row's numbers depend on: its command, and what the recipe that it names says."""
    said = [word.replace(f"{HERE}/", "").replace(sys.executable, "python") for word in words]
    sets = tuple(word.removeprefix("--set=") for word in words if word.startswith("--set="))
    recipes = [load(word, sets).model_dump(mode="json") for word in words if word.endswith(".toml")]
    return json.dumps({"command": said, "recipes": recipes}, indent=1)


def done(row: str, folder: Path) -> bool:
    return (folder / row / "manifest.json").exists() or (folder / f"{row}.json").exists()


def train(rows: list[str], layers: int, seed: int, given: argparse.Namespace) -> None:
    """Train what is missing of a network's rows for one seed.

    Raises: SystemExit: one failed, with its log; one that is there was made on other terms.
    """
    folder = given.out / f"resnet{layers}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        words = command(row, folder, layers, seed, given)
        begun, now = folder / f"{row}.terms.json", terms_of(words)
        if begun.exists() and begun.read_text() != now:
            raise SystemExit(f"{begun}: begun on other terms than these; give another -o, or remove {folder}")
        begun.write_text(now)
        if not done(row, folder):
            print("$", *words, flush=True)
            with (folder / f"{row}.log").open("a") as log:
                failed = subprocess.run(words, check=False, stdout=log, stderr=log).returncode
            if failed:
                raise SystemExit(f"{folder / row}.log: {Path(log.name).read_text().strip()[-500:]}")


def numbers(row: str, folder: Path) -> dict[str, float]:
    """Return the costs of a trained row, and its top-1 after the last epoch."""
    if row.partition("-")[0] in PRUNED:
        kept = json.loads((folder / f"{row}.json").read_text())
        return {"macs": kept["macs"], "params": kept["params"], "top1": kept["top1_by_epoch"][-1]}
    loaded, manifest, _ = artifact.load(folder / row)
    channels, size = len(loaded.preprocessing.mean), loaded.preprocessing.image_size
    macs = count_macs(loaded.model, loaded.model.conv1.weight.new_zeros(1, channels, *size)).macs
    return {
        "macs": macs,
        "params": count_params(loaded.model),
        "top1": manifest.history[-1].metrics["top1"],
    }


def onnx_file(row: str, folder: Path) -> Path:
    path = folder / f"{row}.onnx"
    if not path.exists():
        loaded, manifest, _ = artifact.load(folder / row)
        to_onnx(loaded, path, manifest.plan)
    return path


def table(rows: list[str], layers: int, given: argparse.Namespace) -> list[str]:
    """Return a network's rows as Markdown, means over the seeds that are there, timed as the first seed's."""
    folders = [given.out / f"resnet{layers}-seed{seed}" for seed in given.seeds]
    there = [row for row in rows if done(row, folders[0])]
    bench = bench_onnx({row: onnx_file(row, folders[0]) for row in there}, rounds=ROUNDS)
    lines = [
        f"| ResNet-{layers} | MACs | parameters | top-1 | under dense | under again | times faster |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    found = {row: {folder: numbers(row, folder) for folder in folders if done(row, folder)} for row in there}
    for row, each in found.items():
        macs, params = (mean(one[cost] for one in each.values()) for cost in ("macs", "params"))
        under = [below(found.get(base, {}), each) if base != row else "" for base in ("dense", "again")]
        speed = bench.speedups.get(row)
        faster = f"{speed.median:.2f} ({speed.p10:.2f} to {speed.p90:.2f})" if speed else ""
        top1 = spread([one["top1"] for one in each.values()])
        lines.append(f"| {' | '.join([row, f'{macs / 1e6:.2f}M', f'{params:,.0f}', top1, *under, faster])} |")
    return [*lines, "", f"{bench.conditions}", ""]


def below(base: dict[Path, dict[str, float]], row: dict[Path, dict[str, float]]) -> str:
    return spread([base[folder]["top1"] - one["top1"] for folder, one in row.items() if folder in base])


def spread(points: list[float]) -> str:
    """Return the mean with its standard deviation, and of how many seeds."""
    about = f" ± {stdev(points):.2f}" if len(points) > 1 else ""
    return f"{mean(points):.2f}{about} (n = {len(points)})" if points else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--networks", type=int, nargs="+", default=[20, 32], choices=sorted(WEIGHTS))
    parser.add_argument("--ratios", nargs="+", default=["2.1", "2.6"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    rows = [
        "dense",
        "again",
        *(f"{kind}-{ratio}" for ratio, kind in product(given.ratios, ("lcc", "pruned"))),
    ]
    more = [f"global-{ratio}" for ratio in given.ratios]
    if unknown := set(given.rows or ()) - {*rows, *more}:
        parser.error(f"--rows: {', '.join(sorted(unknown))}: there are {', '.join((*rows, *more))}")
    wanted = rows if given.rows is None else [row for row in (*rows, *more) if row in given.rows]
    with ThreadPoolExecutor(given.jobs) as pool:
        chains = [pool.submit(train, wanted, *one, given) for one in product(given.networks, given.seeds)]
    for chain in chains:
        chain.result()
    lines = [line for layers in given.networks for line in table([*rows, *more], layers, given)]
    (given.out / "table.md").write_text("\n".join(lines))
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
