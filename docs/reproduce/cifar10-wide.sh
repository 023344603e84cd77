#!/usr/bin/env bash
# cifar10-wide: zoo:cifar10 at width 128 with a refiner, 2.1 hours of one core. zoo:cifar10-jko starts from it.
# Run cifar10.sh first: it keeps the guide, runs/cifar10@2500.
set -euo pipefail

wide=(--config cifar10 --set velocity.width=128)
jkoflow train "${wide[@]}" --run runs/wide --init-from zoo:cifar10 --set train.iterations=5000 --set train.lr=3e-3 \
  --set fm.snapshot_every=1250
jkoflow train "${wide[@]}" --run runs/wider --init-from runs/wide --set train.iterations=4500 --set train.lr=2e-3 \
  --set fm.snapshot_every=1500
jkoflow train --config cifar10-refiner --run runs/cifar10-refiner

# export before runs/wider itself is evaluated: numbers of other images are refused
jkoflow export   --run runs/wider --guide runs/cifar10@2500 --guidance 2.5 --steps 8 --refiner runs/cifar10-refiner \
  --out exported/cifar10-wide
jkoflow evaluate --run exported/cifar10-wide -n 10000 --kid 2000 --set evaluate.nll=0
jkoflow evaluate --run runs/wider -n 10000 --guide runs/cifar10@2500 --guidance 2.5 --steps 8    # without the refiner

# the ablation with a higher rate
jkoflow train    "${wide[@]}" --run runs/wide-6e-3 --init-from zoo:cifar10 --set train.iterations=4700 --set train.lr=6e-3
jkoflow evaluate --run runs/wide-6e-3 -n 10000 --guide runs/cifar10@2500 --guidance 2.5 --steps 8
