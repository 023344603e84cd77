#!/usr/bin/env bash
# zoo:cifar10-jko: two networks of width 128, and JKO blocks that start as parts of them.
# Run cifar10-wide.sh first. The steps take 3 690 s of two cores, and 1 466 s and then 1 584 s of one.
set -euo pipefail

two=(--config cifar10 --init-from exported/cifar10-wide --run runs/two --set velocity.width=128 --set velocity.nets=2
     --set sampler.steps=8 --set fm.snapshot_every=0 --set train.batch_size=128 --set train.lr=2.5e-3 --set train.warmup=50
     --set train.iterations=9000)
helpers=(--guide exported/cifar10-wide/guide --guidance 2.5 --refiner exported/cifar10-wide/refiner)
quick=(--set generate.precision=bf16 --set evaluate.nll=0 --set evaluate.floor=false)
# one network for each half of time, on a core each
for network in 0 1; do taskset -c "$network" jkoflow train "${two[@]}" --network "$network" & done
wait
jkoflow train "${two[@]}" --resume    # joins them
jkoflow train --config cifar10-jko --set velocity.width=128 --init-from runs/two --run runs/cifar10-jko \
  --set 'train.iterations=[300,200]'
# the blocks again, at half the learning rate and with a longer average
jkoflow train --config cifar10-jko --set velocity.width=128 --init-from runs/cifar10-jko --run runs/cifar10-jko-2 \
  --set 'train.iterations=[300,200]' --set train.lr=1e-3 --set train.ema=0.99 --set train.seed=1
# the refiner again with the same seed, to be solved in four steps
jkoflow train    --config cifar10-refiner --run runs/cifar10-refiner-4 --set sampler.steps=4
jkoflow export   --run runs/cifar10-jko-2 --guide exported/cifar10-wide/guide --guidance 2.5 --refiner runs/cifar10-refiner-4 \
  --dtype shared --out exported/cifar10-jko
jkoflow evaluate --run exported/cifar10-jko -n 10000 --kid 2000 --set evaluate.nll=32

# the comparison: the two networks, and JKO blocks from one network
# the parts before JKO were measured by a script that is not in the repository
jkoflow evaluate --run runs/two -n 1000 --seed 1 --kid 1000 "${helpers[@]}" "${quick[@]}"
jkoflow evaluate --run runs/two -n 10000 "${helpers[@]}" "${quick[@]}"
jkoflow train --config cifar10-jko --set velocity.width=128 --init-from exported/cifar10-wide --run runs/one-jko \
  --set 'train.iterations=[150,100]'
jkoflow evaluate --run runs/one-jko -n 1000 --seed 1 --kid 1000 "${helpers[@]}" "${quick[@]}"
jkoflow evaluate --run runs/one-jko -n 10000 "${helpers[@]}" "${quick[@]}"
for weight in 2.5 3 3.5; do
  jkoflow evaluate --run exported/cifar10-wide -n 1000 --seed 1 --kid 1000 --guidance "$weight" "${quick[@]}"
done
