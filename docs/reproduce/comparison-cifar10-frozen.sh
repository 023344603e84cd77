#!/usr/bin/env bash
# docs/comparison.md: eight JKO blocks on CIFAR-10 that start as parts of a flow-matching network, one core.
set -euo pipefail

common=(--config cifar10 --set data.limit=20000 --set latents.mirror=false --set velocity.classes=0
        --set generate.guidance=null --set fm=null --set matching=null --set train.precision=fp32
        --set velocity.width=32 --set train.warmup=20)
jkoflow encode "${common[@]}"
jkoflow train  "${common[@]}" --run runs/c-trig --set matching.interpolant=trigonometric --set train.batch_size=64 \
  --set train.iterations=3500 --set train.ema=0.998 --set sampler.steps=16
jkoflow train  "${common[@]}" --run runs/c-frozen --init-from runs/c-trig --set train.objective=jko \
  --set train.batch_size=32 --set 'train.iterations=[200,100]' --set train.lr=3e-3 --set train.ema=0.95 \
  --set 'jko.h=[0.04,0.06,0.11,0.17,0.26,0.42,0.85]' --set schedule.tolerance=0 \
  --set jko.solver.method=midpoint --set 'jko.solver.steps=[2,1]' \
  --set sampler.method=rk4 --set 'sampler.steps=[2,1]'
for run in c-trig c-frozen; do
  jkoflow evaluate --run "runs/$run" -n 1000 --seed 1 --set evaluate.nll=32
done

# half an hour for flow matching and then JKO, width 64; other seeds: --set train.seed=1, 2 in both trainings
half=(--config cifar10 --set data.limit=20000 --set latents.mirror=false --set velocity.classes=0
      --set generate.guidance=null --set fm=null --set matching=null)
jkoflow train "${half[@]}" --run runs/h-trig --set matching.interpolant=trigonometric --set train.batch_size=64 \
  --set train.iterations=6400 --set sampler.steps=24
jkoflow train "${half[@]}" --run runs/h-jko --init-from runs/h-trig --set train.objective=jko --set train.precision=fp32 \
  --set train.batch_size=32 --set 'train.iterations=[300,200]' --set train.lr=2e-3 --set train.warmup=20 \
  --set train.ema=0.98 --set 'jko.h=[0.04,0.06,0.11,0.17,0.26,0.42,0.85]' --set schedule.tolerance=0 \
  --set jko.solver.method=midpoint --set 'jko.solver.steps=[2,1]' \
  --set sampler.method=midpoint --set 'sampler.steps=[2,1]'
for run in h-trig h-jko; do
  jkoflow evaluate --run "runs/$run" -n 1000 --seed 1 --kid 1000 --set evaluate.nll=32
done
# instead of JKO: a network for each part of time, by flow matching
jkoflow train "${half[@]}" --run runs/h-nets --init-from runs/h-trig --set velocity.nets=8 \
  --set matching.interpolant=trigonometric --set train.batch_size=256 --set train.iterations=420 --set train.lr=4e-3 \
  --set train.warmup=20 --set train.ema=0.98 --set sampler.steps=8 --set train.preview_every=0
jkoflow evaluate --run runs/h-nets -n 1000 --seed 1 --set evaluate.nll=0
