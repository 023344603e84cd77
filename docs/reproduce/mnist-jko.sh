#!/usr/bin/env bash
# zoo:mnist-jko and docs/comparison.md: JKO blocks that start as parts of mnist-fine, a quarter of an hour of one core.
# The comparison takes another hour.
# Run mnist-fine.sh first: it makes the flow and its guide.
set -euo pipefail

fine=exported/mnist-fine
jkoflow encode   --config mnist-fine
jkoflow train    --config mnist-jko --init-from "$fine" --run runs/mnist-jko --set train.lr=1e-3
jkoflow export   --run runs/mnist-jko --guide "$fine/guide" --guidance 2 --dtype shared --out exported/mnist-jko
jkoflow evaluate --run exported/mnist-jko -n 10000 --kid 2000 --set evaluate.nll=64

# the comparison: the same on 2 000 images without rounding, and with the learning rate 2e-3
quick=(-n 2000 --seed 1 --guidance 2 --set evaluate.floor=false --set evaluate.nll=0)
jkoflow train    --config mnist-jko --init-from "$fine" --run runs/m-converted
for run in mnist-jko m-converted; do
  jkoflow evaluate --run "runs/$run" --guide "$fine/guide" "${quick[@]}"
done

# flow and guide learn the trigonometric interpolant first
fm=(--config mnist-fine --set train.precision=fp32 --set matching.interpolant=trigonometric --set train.batch_size=64
    --set train.lr=4e-3 --set train.ema=0.995)
jkoflow train "${fm[@]}" --run runs/m-trigonometric --init-from "$fine" --set latents.draws=2 \
  --set train.iterations=2400 --set train.warmup=50 --set sampler.steps=12
jkoflow train "${fm[@]}" --run runs/m-guide --init-from "$fine/guide" --set velocity.width=32 \
  --set train.iterations=500 --set train.warmup=40 --set sampler.steps=1
jkoflow train --config mnist-jko --init-from runs/m-trigonometric --run runs/m-jko
# a guide that is trained by JKO, too
jkoflow train --config mnist-jko --set velocity.width=32 --init-from runs/m-guide --run runs/m-guide-jko
for guide in runs/m-guide runs/m-guide-jko; do
  jkoflow evaluate --run runs/m-jko --guide "$guide" --guidance 2 -n 10000 --set evaluate.nll=0
  jkoflow evaluate --run runs/m-jko --guide "$guide" "${quick[@]}"
done
