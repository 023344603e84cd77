#!/usr/bin/env bash
# docs/comparison.md: JKO blocks on CIFAR-10 that start as parts of zoo:cifar10, about an hour of one core.
set -euo pipefail

common=(--config cifar10 --set train.precision=fp32 --set generate.guidance=null)
frozen=(--set fm=null --set matching=null --set train.objective=jko --set schedule.tolerance=0
        --set 'jko.h=[0.04,0.06,0.11,0.17,0.26,0.42,0.85]' --set jko.solver.method=midpoint --set 'jko.solver.steps=[2,1]'
        --set sampler.method=midpoint --set 'sampler.steps=[2,1]')
jkoflow encode --config cifar10

# the shipped flow learns the trigonometric interpolant, which keeps the variance that the potential of JKO asks for
jkoflow train "${common[@]}" --run runs/c-trigonometric --init-from zoo:cifar10 --set matching.interpolant=trigonometric \
  --set train.batch_size=64 --set train.iterations=2800 --set train.lr=4e-3 --set train.warmup=50 --set train.ema=0.995
# eight parts of it, frozen, then trained by JKO
jkoflow train "${common[@]}" "${frozen[@]}" --run runs/c-jko-polished --init-from runs/c-trigonometric \
  --set train.batch_size=32 --set 'train.iterations=[300,250]' --set train.lr=2e-3 --set train.ema=0.98 --set train.warmup=20
# the same flow, trained on by flow matching instead
jkoflow train "${common[@]}" --run runs/c-continued --init-from runs/c-trigonometric --set matching.interpolant=trigonometric \
  --set train.batch_size=64 --set train.iterations=3200 --set train.lr=4e-3 --set train.warmup=50 --set train.ema=0.995
# the same parts without JKO: two iterations that change nothing
jkoflow train "${common[@]}" "${frozen[@]}" --run runs/c-only-frozen --init-from runs/c-trigonometric \
  --set train.batch_size=8 --set 'train.iterations=[2,2]' --set train.lr=1e-6 --set train.ema=0 --set train.warmup=0
for run in runs/c-trigonometric runs/c-continued runs/c-jko-polished runs/c-only-frozen; do
  jkoflow evaluate --run "$run" -n 1000 --seed 1 --set evaluate.nll=32
done
jkoflow evaluate --run zoo:cifar10 --guide none --guidance 1 -n 1000 --seed 1

# a small guide without classes, frozen at the same times
jkoflow train "${common[@]}" --run runs/c-guide --set velocity.classes=0 --set velocity.width=32 \
  --set matching.interpolant=trigonometric --set train.batch_size=64 --set train.iterations=2200 --set train.warmup=20 \
  --set train.ema=0.995 --set sampler.steps=1
jkoflow train "${common[@]}" "${frozen[@]}" --run runs/c-frozen-guide --init-from runs/c-guide --set velocity.classes=0 \
  --set velocity.width=32 --set train.batch_size=8 --set 'train.iterations=[2,2]' --set train.lr=1e-6 --set train.ema=0 \
  --set train.warmup=0
jkoflow evaluate --run runs/c-jko-polished --guide runs/c-frozen-guide --guidance 2 -n 10000
