#!/usr/bin/env bash
# zoo:mnist-jko and docs/comparison.md: JKO blocks that start as parts of zoo:mnist-fine, 45 minutes of one core.
set -euo pipefail

fm=(--config mnist-fine --set train.precision=fp32 --set matching.interpolant=trigonometric --set train.batch_size=64
    --set train.lr=4e-3 --set train.ema=0.995)
jkoflow encode --config mnist-fine
jkoflow train "${fm[@]}" --run runs/m-trigonometric --init-from zoo:mnist-fine --set latents.draws=2 \
  --set train.iterations=2400 --set train.warmup=50 --set sampler.steps=12
jkoflow train "${fm[@]}" --run runs/m-guide --init-from zoo:mnist-fine/guide --set velocity.width=32 \
  --set train.iterations=500 --set train.warmup=40 --set sampler.steps=1
jkoflow train --config mnist-jko --init-from runs/m-trigonometric --run runs/mnist-jko
# a guide that is trained by JKO, too
jkoflow train    --config mnist-jko --set velocity.width=32 --init-from runs/m-guide --run runs/m-guide-jko
jkoflow export   --run runs/mnist-jko --guide runs/m-guide-jko --guidance 2 --dtype int10 --out exported/mnist-jko
jkoflow evaluate --run exported/mnist-jko -n 10000 --kid 2000 --set evaluate.nll=64
# the guide of flow matching instead
jkoflow evaluate --run runs/mnist-jko --guide runs/m-guide --guidance 2 -n 10000 --set evaluate.nll=0
for guide in runs/m-guide runs/m-guide-jko; do
  jkoflow evaluate --run exported/mnist-jko -n 2000 --seed 1 --guide "$guide" --guidance 2 --set evaluate.floor=false \
    --set evaluate.nll=0
done
# from zoo:mnist-fine without learning the interpolant
jkoflow train    --config mnist-jko --init-from zoo:mnist-fine --run runs/m-converted
jkoflow evaluate --run runs/m-converted -n 2000 --seed 1 --guide zoo:mnist-fine/guide --guidance 2 \
  --set evaluate.floor=false --set evaluate.nll=0
