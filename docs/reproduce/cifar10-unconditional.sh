#!/usr/bin/env bash
# docs/comparison.md: CIFAR-10 without classes and guidance, from cifar10-wide.sh, and by JKO after it.
set -euo pipefail

none=(--set velocity.classes=0 --set velocity.width=128 --set generate.guidance=null)
jkoflow encode --config cifar10
fm=(--config cifar10 "${none[@]}" --set fm.snapshot_every=0 --set matching.interpolant=trigonometric
    --set train.batch_size=64 --set train.lr=4e-3 --set train.warmup=50)
# the field of the null label learns the trigonometric interpolant
jkoflow train "${fm[@]}" --init-from exported/cifar10-wide --run runs/wide-none --set train.iterations=1000 --set train.ema=0.995
jkoflow train "${fm[@]}" --init-from runs/wide-none --run runs/wide-none-longer --set train.iterations=2400 --set train.ema=0.998
# eight frozen parts of it are trained by JKO
jkoflow train --config cifar10-jko "${none[@]}" --init-from runs/wide-none --run runs/wide-none-jko \
  --set 'train.iterations=[150,100]'
jkoflow train --config cifar10-jko "${none[@]}" --init-from runs/wide-none-longer --run runs/wide-none-longer-jko
# the same with the linear interpolant, whose parts are converted
jkoflow train --config cifar10 "${none[@]}" --init-from exported/cifar10-wide --run runs/wide-none-linear \
  --set fm.snapshot_every=0 --set train.batch_size=64 --set train.lr=3e-3 --set train.warmup=50 \
  --set train.iterations=2800 --set train.ema=0.998
jkoflow train --config cifar10-jko "${none[@]}" --init-from runs/wide-none-linear --run runs/wide-none-linear-jko \
  --set 'train.iterations=[150,100]'
# two networks, one for each half of time, on a core each; then JKO
two=(--config cifar10 "${none[@]}" --init-from exported/cifar10-wide --run runs/wide-none-two --set velocity.nets=2
     --set fm.snapshot_every=0 --set train.batch_size=128 --set train.lr=3e-3 --set train.warmup=50 --set train.iterations=9000)
for network in 0 1; do taskset -c "$network" jkoflow train "${two[@]}" --network "$network" & done
wait
jkoflow train "${two[@]}" --resume    # joins them
jkoflow train --config cifar10-jko "${none[@]}" --init-from runs/wide-none-two --run runs/wide-none-two-jko \
  --set 'train.iterations=[150,100]'
evaluate=(--set generate.precision=bf16 --set evaluate.nll=0 --set evaluate.floor=false)
for run in wide-none wide-none-jko wide-none-longer wide-none-longer-jko wide-none-linear wide-none-linear-jko \
  wide-none-two wide-none-two-jko; do
  jkoflow evaluate --run "runs/$run" -n 1000 --seed 1 "${evaluate[@]}"
done
for run in wide-none-two wide-none-two-jko; do
  jkoflow evaluate --run "runs/$run" -n 1000 --seed 1 --refiner exported/cifar10-wide/refiner "${evaluate[@]}"
done
for run in wide-none-jko wide-none-longer-jko wide-none-two wide-none-two-jko; do
  jkoflow evaluate --run "runs/$run" -n 10000 --refiner exported/cifar10-wide/refiner "${evaluate[@]}"
done
