#!/usr/bin/env bash
# docs/comparison.md: JKO blocks of width 64 that start as parts of zoo:cifar10, 45 minutes of one core.
set -euo pipefail

fm=(--config cifar10 --set train.precision=fp32 --set matching.interpolant=trigonometric --set train.batch_size=64
    --set train.lr=4e-3)
jkoflow encode --config cifar10

# the shipped flow and its guide learn the trigonometric interpolant, which keeps the variance that JKO's potential asks for
jkoflow train "${fm[@]}" --run runs/c-trigonometric --init-from zoo:cifar10 --set train.iterations=2800 --set train.warmup=50 \
  --set train.ema=0.995
jkoflow train "${fm[@]}" --run runs/c-guide --init-from zoo:cifar10/guide --set train.iterations=400 --set train.warmup=40 \
  --set train.ema=0.99 --set sampler.steps=1
# eight parts of the flow, frozen, then trained by JKO
jkoflow train --config cifar10-jko --init-from runs/c-trigonometric --run runs/narrow-jko
jkoflow export   --run runs/narrow-jko --guide runs/c-guide --guidance 2.5 --refiner zoo:cifar10-jko/refiner --dtype int10 \
  --out exported/narrow-jko
jkoflow evaluate --run exported/narrow-jko -n 10000 --kid 2000 --set evaluate.nll=32

# the comparison, without guidance: as many seconds of flow matching instead, and the parts without JKO
jkoflow train "${fm[@]}" --run runs/c-continued --init-from runs/c-trigonometric --set train.iterations=3200 \
  --set train.warmup=50 --set train.ema=0.995
jkoflow train --config cifar10-jko --init-from runs/c-trigonometric --run runs/c-only-frozen --set train.batch_size=8 \
  --set 'train.iterations=[2,2]' --set train.lr=1e-6 --set train.ema=0 --set train.warmup=0
for run in runs/c-trigonometric runs/c-continued runs/c-only-frozen runs/narrow-jko; do
  jkoflow evaluate --run "$run" --guidance 1 -n 1000 --seed 1 --set evaluate.nll=32
done
jkoflow evaluate --run zoo:cifar10 --guide none --guidance 1 -n 1000 --seed 1

# with guidance: a network of width 32 without classes, and the early state
jkoflow train "${fm[@]}" --run runs/c-small --set velocity.classes=0 --set velocity.width=32 --set train.lr=8e-3 \
  --set train.iterations=2200 --set train.warmup=20 --set train.ema=0.995 --set sampler.steps=1
for run in runs/c-trigonometric runs/c-only-frozen runs/narrow-jko; do
  jkoflow evaluate --run "$run" --guide runs/c-small --guidance 2 -n 1000 --seed 1
done
for weight in 2 2.5; do
  jkoflow evaluate --run runs/narrow-jko --guide runs/c-guide --guidance "$weight" -n 1000 --seed 1
done
