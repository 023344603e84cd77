#!/usr/bin/env bash
# docs/comparison.md: the stand-in for ImageNet-32 by JKO blocks that start as parts of a flow-matching network.
# Run imagenet32-like.sh DIR first: it makes the reference, the flow and its guide, a snapshot.
# The values at n = 5 000 take -n 5000. The parts before JKO were measured by a script that is not in the repository.
set -euo pipefail

dir=${1:?usage: imagenet32-like-jko.sh DIR}
data=(--set data.path="$dir")
fm=(--config imagenet32 "${data[@]}" --set velocity.classes=200 --set train.lr=4e-3
    --set train.batch_size=64 --set matching.interpolant=trigonometric --set fm.snapshot_every=0)
jko=(--config cifar10-jko --set data.name=imagenet32 "${data[@]}" --set velocity.classes=200)

# flow and guide learn the trigonometric interpolant
jkoflow train "${fm[@]}" --set velocity.width=64 --run runs/like-trigonometric --init-from runs/like \
  --set train.iterations=2800 --set train.warmup=50 --set train.ema=0.995
jkoflow train "${fm[@]}" --set velocity.width=64 --run runs/like-guide --init-from exported/imagenet32-like/guide \
  --set train.iterations=400 --set train.warmup=40 --set train.ema=0.99 --set sampler.steps=1
# eight frozen parts of each are trained by JKO
jkoflow train "${jko[@]}" --init-from runs/like-trigonometric --run runs/like-jko
jkoflow train "${jko[@]}" --init-from runs/like-guide --run runs/like-guide-jko --set 'train.iterations=[100,80]'

# width 128: the two networks of the shipped run, then eight frozen parts of them
jkoflow train "${fm[@]}" --set velocity.width=128 --set velocity.nets=2 --run runs/wide-trigonometric \
  --init-from zoo:imagenet32-like-wide --set train.iterations=700 --set train.warmup=50 --set train.ema=0.995 \
  --set sampler.steps=8
jkoflow train "${jko[@]}" --set velocity.width=128 --init-from runs/wide-trigonometric --run runs/wide-jko \
  --set 'train.iterations=[150,100]'
# width 128 without this step: parts of the shipped run, converted to the interpolant exactly
jkoflow train "${jko[@]}" --set velocity.width=128 --init-from zoo:imagenet32-like-wide --run runs/wide-parts-jko \
  --set 'train.iterations=[150,100]'

guided=(--guide runs/like-guide-jko --refiner zoo:imagenet32-like-wide/refiner --dtype int10)
for weight in 2.5 3 3.5; do
  jkoflow export --run runs/like-jko "${guided[@]}" --guidance "$weight" --out "exported/like-jko-$weight"
done
jkoflow export --run runs/wide-jko "${guided[@]}" --guidance 3.3 --out exported/wide-jko
evaluate=("${data[@]}" --reference tiny.safetensors --set generate.precision=bf16 --set evaluate.floor=false
          --set evaluate.nll=0)
for run in exported/like-jko-2.5 exported/like-jko-3 exported/like-jko-3.5 zoo:imagenet32-like-wide; do
  jkoflow evaluate --run "$run" -n 1000 --seed 1 "${evaluate[@]}"
done
jkoflow evaluate --run runs/wide-trigonometric -n 1000 --seed 1 --guide runs/like-guide --guidance 3.3 \
  --refiner zoo:imagenet32-like-wide/refiner "${evaluate[@]}"
jkoflow evaluate --run exported/wide-jko -n 1000 --seed 1 "${evaluate[@]}"
jkoflow evaluate --run exported/wide-jko -n 10000 "${evaluate[@]}"
parts=(--run runs/wide-parts-jko --guidance 3.3 --refiner zoo:imagenet32-like-wide/refiner "${evaluate[@]}")
for guide in zoo:imagenet32-like-wide/guide runs/like-guide-jko; do
  jkoflow evaluate "${parts[@]}" -n 1000 --seed 1 --guide "$guide"
done
jkoflow evaluate "${parts[@]}" -n 10000 --guide zoo:imagenet32-like-wide/guide
