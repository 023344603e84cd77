#!/usr/bin/env bash
# docs/comparison.md: time-independent JKO blocks on CIFAR-10, about half an hour of one core, and the noise of its gradients.
set -euo pipefail

settings=(--config cifar10 --set data.limit=20000 --set latents.mirror=false --set velocity.classes=0
          --set generate.guidance=null --set train.warmup=20 --set train.precision=fp32 --set train.objective=jko
          --set train.batch_size=16 --set 'train.iterations=[1200,1000]' --set train.lr=1e-2 --set train.ema=0.99
          --set velocity.width=32 --set 'jko.h=[0.3,0.6,1.1]' --set schedule.tolerance=0
          --set jko.solver.method=midpoint --set 'jko.solver.steps=[3,2]'
          --set sampler.method=rk4 --set 'sampler.steps=[2,1]')
jkoflow encode "${settings[@]}"
jkoflow train "${settings[@]}" --run runs/c-jko-autonomous
jkoflow evaluate --run runs/c-jko-autonomous -n 1000 --seed 1 --set evaluate.nll=32
jkoflow train --run runs/c-jko-autonomous --measure-noise
jkoflow train --run runs/c-jko-autonomous --resume --refine 2 --set jko.later_iterations=400
jkoflow evaluate --run runs/c-jko-autonomous -n 1000 --seed 1 --set evaluate.nll=32

# twice the iterations, and four sub-intervals in block 0
jkoflow train "${settings[@]}" --run runs/c-jko-longer --set 'train.iterations=[2000,2600]' --set train.ema=0.995 \
  --set 'jko.solver.steps=[4,2]' --set 'sampler.steps=[3,1]'
jkoflow evaluate --run runs/c-jko-longer -n 1000 --seed 1 --set evaluate.nll=32
