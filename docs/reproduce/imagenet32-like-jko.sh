#!/usr/bin/env bash
# zoo:imagenet32-like-jko and docs/comparison.md: the stand-in by JKO blocks that start as parts of imagenet32-like-wide.
# Run imagenet32-like.sh DIR and imagenet32-like-wide.sh DIR first. imagenet32-like-jko.sh DIR
# The values at n = 5 000 take -n 5000. The parts before JKO were measured by a script that is not in the repository.
set -euo pipefail

dir=${1:?usage: imagenet32-like-jko.sh DIR}
data=(--set data.path="$dir")
jko=(--config cifar10-jko --set name=imagenet32-jko --set data.name=imagenet32 "${data[@]}" --set velocity.classes=200
     --set evaluate.reference=tiny.safetensors)
wide=exported/imagenet32-like-wide
evaluate=("${data[@]}" --reference tiny.safetensors)
quick=("${evaluate[@]}" --set generate.precision=bf16 --set evaluate.floor=false --set evaluate.nll=0)

# the shipped run: parts of the flow, converted to the trigonometric interpolant exactly
jkoflow train    "${jko[@]}" --set velocity.width=128 --init-from "$wide" --run runs/imagenet32-like-jko \
  --set 'train.iterations=[150,100]'
jkoflow export   --run runs/imagenet32-like-jko --guide "$wide/guide" --guidance 3.3 --refiner "$wide/refiner" \
  --dtype shared --out exported/imagenet32-like-jko
jkoflow evaluate --run exported/imagenet32-like-jko -n 10000 --kid 2000 --set evaluate.nll=32 "${evaluate[@]}"
# before its weights were rounded
parts=(--run runs/imagenet32-like-jko --guidance 3.3 --refiner "$wide/refiner" "${quick[@]}")
jkoflow evaluate "${parts[@]}" -n 10000 --guide "$wide/guide"
jkoflow evaluate "${parts[@]}" -n 1000 --seed 1 --guide "$wide/guide"

# the comparison: flow and guide learn the trigonometric interpolant, at width 64
fm=(--config imagenet32 "${data[@]}" --set velocity.classes=200 --set train.lr=4e-3
    --set train.batch_size=64 --set matching.interpolant=trigonometric --set fm.snapshot_every=0)
jkoflow train "${fm[@]}" --set velocity.width=64 --run runs/like-trigonometric --init-from runs/like \
  --set train.iterations=2800 --set train.warmup=50 --set train.ema=0.995
jkoflow train "${fm[@]}" --set velocity.width=64 --run runs/like-guide --init-from exported/imagenet32-like/guide \
  --set train.iterations=400 --set train.warmup=40 --set train.ema=0.99 --set sampler.steps=1
# eight frozen parts of each are trained by JKO
jkoflow train "${jko[@]}" --init-from runs/like-trigonometric --run runs/like-jko
jkoflow train "${jko[@]}" --init-from runs/like-guide --run runs/like-guide-jko --set 'train.iterations=[100,80]'
# the same with the two networks of width 128
jkoflow train "${fm[@]}" --set velocity.width=128 --set velocity.nets=2 --run runs/wide-trigonometric \
  --init-from "$wide" --set train.iterations=700 --set train.warmup=50 --set train.ema=0.995 --set sampler.steps=8
jkoflow train "${jko[@]}" --set velocity.width=128 --init-from runs/wide-trigonometric --run runs/wide-jko \
  --set 'train.iterations=[150,100]'

guided=(--guide runs/like-guide-jko --refiner "$wide/refiner" --dtype int10)
for weight in 2.5 3 3.5; do
  jkoflow export --run runs/like-jko "${guided[@]}" --guidance "$weight" --out "exported/like-jko-$weight"
done
jkoflow export --run runs/wide-jko "${guided[@]}" --guidance 3.3 --out exported/wide-jko
for run in exported/like-jko-2.5 exported/like-jko-3 exported/like-jko-3.5 "$wide"; do
  jkoflow evaluate --run "$run" -n 1000 --seed 1 "${quick[@]}"
done
jkoflow evaluate --run runs/wide-trigonometric -n 1000 --seed 1 --guide runs/like-guide --guidance 3.3 \
  --refiner "$wide/refiner" "${quick[@]}"
jkoflow evaluate --run exported/wide-jko -n 1000 --seed 1 "${quick[@]}"
jkoflow evaluate --run exported/wide-jko -n 10000 "${quick[@]}"
jkoflow evaluate "${parts[@]}" -n 1000 --seed 1 --guide runs/like-guide-jko
