#!/usr/bin/env bash
# docs/comparison.md on MNIST: three objectives, longer JKO training, and the polish. The rows of JKO had probes that
# were held through a solve, so the present code gives other numbers.
set -euo pipefail

jkoflow encode --config mnist
jkoflow train  --config mnist --run runs/jko --set velocity.autonomous=false
jkoflow train  --config mnist-lfm --run runs/lfm
jkoflow train  --config mnist --run runs/fm --set train.objective=fm --set train.iterations=1850 \
  --set train.ema=0.999 --set velocity.width=516 --set sampler.steps=16

# JKO with twice the iterations, held to its grid
jkoflow train  --config mnist --run runs/jko-500 --set train.iterations=500 --set jko.jacobian_weight=0.05 \
  --set schedule.tolerance=0 --set velocity.autonomous=false

# blocks of local flow matching, trained on by either objective
jkoflow train  --config mnist-lfm --run runs/lfm-2 --init-from runs/lfm --set train.iterations=1950
jkoflow train  --config mnist --run runs/polish --init-from runs/lfm --set 'jko.h=[0.1,0.15,0.225]' \
  --set schedule.tolerance=0 --set jko.solver.steps=4 --set train.iterations=100 --set train.lr=3e-4 \
  --set velocity.autonomous=false

for run in jko lfm fm jko-500 lfm-2 polish; do
  jkoflow evaluate --run "runs/$run" -n 2000 --kid 2000 --set evaluate.nll=256
done
