#!/usr/bin/env bash
# Every row of the CIFAR-10 table, for several seeds: the dense baseline first, which then teaches the others.
# Usage, in a folder with data/ and weights/ as the recipes' headers say: bash cifar10-resnet20.sh [EPOCHS [SEED...]]
# It goes on where it was stopped. Nothing here needs a GPU; 60 epochs want one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
epochs=${1:-10}
shift || true
for seed in "${@:-0}"; do
  out=runs/epochs$epochs-seed$seed
  mkdir -p "$out"
  for row in dense linear-mix-{data,mask,scratch,half} budget {rd-explicit,mgic,shared}{,-scratch}; do
    [ -e "$out/$row/manifest.json" ] && continue
    options=(--set "finetune.epochs=$epochs" --set "finetune.seed=$seed")
    if [ "$row" != dense ]; then
      options+=(--set "teacher.source=\"$out/dense\"")
      case $row in
        *-scratch) options+=(--set "model.seed=$seed") ;;
        *) options+=(--set "model.source=\"$out/dense\"") ;;
      esac
    fi
    lcc run "$here/cifar10-resnet20-$row.toml" -o "$out/$row" --resume "${options[@]}"
  done
  lcc report "$out"/*/ --no-latency
done
