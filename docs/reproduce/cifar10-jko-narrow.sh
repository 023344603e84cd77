#!/usr/bin/env bash
# zoo:cifar10-jko and docs/comparison.md: JKO blocks that start as parts of zoo:cifar10, 45 minutes of one core.
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
jkoflow train --config cifar10-jko --init-from runs/c-trigonometric --run runs/cifar10-jko
jkoflow export   --run runs/cifar10-jko --guide runs/c-guide --guidance 2.5 --refiner zoo:cifar10-wide/refiner --dtype int10 \
  --out exported/cifar10-jko
jkoflow evaluate --run exported/cifar10-jko -n 10000 --kid 2000 --set evaluate.nll=32

# width 128: parts of the shipped flow, converted to the interpolant exactly, 15 minutes of JKO; 1 000 images first
# the parts before JKO were measured by a script that is not in the repository
wide=(--guide zoo:cifar10-wide/guide --guidance 2.5 --refiner zoo:cifar10-wide/refiner --set generate.precision=bf16
      --set evaluate.nll=0 --set evaluate.floor=false)
jkoflow train --config cifar10-jko --set velocity.width=128 --init-from zoo:cifar10-wide --run runs/cifar10-wide-jko \
  --set 'train.iterations=[150,100]'
jkoflow evaluate --run runs/cifar10-wide-jko -n 1000 --seed 1 --kid 1000 "${wide[@]}"
jkoflow evaluate --run runs/cifar10-wide-jko -n 10000 "${wide[@]}"
for weight in 2.5 3 3.5; do
  jkoflow evaluate --run zoo:cifar10-wide -n 1000 --seed 1 --kid 1000 --guidance "$weight" --set generate.precision=bf16 \
    --set evaluate.nll=0 --set evaluate.floor=false
done

# the comparison, without guidance: as many seconds of flow matching instead, and the parts without JKO
jkoflow train "${fm[@]}" --run runs/c-continued --init-from runs/c-trigonometric --set train.iterations=3200 \
  --set train.warmup=50 --set train.ema=0.995
jkoflow train --config cifar10-jko --init-from runs/c-trigonometric --run runs/c-only-frozen --set train.batch_size=8 \
  --set 'train.iterations=[2,2]' --set train.lr=1e-6 --set train.ema=0 --set train.warmup=0
for run in runs/c-trigonometric runs/c-continued runs/c-only-frozen runs/cifar10-jko; do
  jkoflow evaluate --run "$run" --guidance 1 -n 1000 --seed 1 --set evaluate.nll=32
done
jkoflow evaluate --run zoo:cifar10 --guide none --guidance 1 -n 1000 --seed 1

# with guidance: a network of width 32 without classes, and the early state
jkoflow train "${fm[@]}" --run runs/c-small --set velocity.classes=0 --set velocity.width=32 --set train.lr=8e-3 \
  --set train.iterations=2200 --set train.warmup=20 --set train.ema=0.995 --set sampler.steps=1
for run in runs/c-trigonometric runs/c-only-frozen runs/cifar10-jko; do
  jkoflow evaluate --run "$run" --guide runs/c-small --guidance 2 -n 1000 --seed 1
done
for weight in 2 2.5; do
  jkoflow evaluate --run runs/cifar10-jko --guide runs/c-guide --guidance "$weight" -n 1000 --seed 1
done
