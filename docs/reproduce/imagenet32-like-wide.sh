#!/usr/bin/env bash
# imagenet32-like-wide, the stand-in at width 128 as two networks with a refiner.
# Run imagenet32-like.sh DIR first: it makes the reference and keeps the guide. imagenet32-like-wide.sh DIR
# The stages take 5 922, 5 285 and 928 s of one core, and 7 019 and 5 950 s of two.
set -euo pipefail

dir=${1:?usage: imagenet32-like-wide.sh DIR}
data=(--set data.path="$dir")
wide=(--config imagenet32 "${data[@]}" --set velocity.width=128 --set velocity.classes=200)
two=(--set velocity.nets=2 --set train.batch_size=256 --set sampler.steps=8)
guide=(--guide runs/like-first@500 --steps 8)

# one network, with the unsharp mask measured on these images
jkoflow autoencoder train --config rgb32-kl-8x8 --set data.name=imagenet32 "${data[@]}" --out runs/mask \
  --set training.start=rgb32-kl-8x8 --set training.iterations=0
jkoflow train "${wide[@]}" --run runs/W --init-from runs/like --set train.batch_size=128 \
  --set train.iterations=5500 --set train.lr=3e-3
jkoflow train "${wide[@]}" --run runs/W2 --init-from runs/W --set train.batch_size=128 \
  --set train.iterations=9500 --set train.lr=3e-3

# two networks, one for each half of the time, on a core each
torchrun --standalone --nproc_per_node 2 -m pipeline train "${wide[@]}" "${two[@]}" -r runs/W3 --init-from runs/W2 \
  --set train.iterations=5200 --set train.lr=3e-3
torchrun --standalone --nproc_per_node 2 -m pipeline train "${wide[@]}" "${two[@]}" -r runs/W4 --init-from runs/W3 \
  --set train.iterations=5000 --set train.lr=2.5e-3 --set train.seed=1

# the steps of the ablation, with the mask
for run in W W2 W3; do
  jkoflow export   --run "runs/$run" "${guide[@]}" --guidance 3 --autoencoder runs/mask/autoencoder.safetensors --out "exported/$run"
  jkoflow evaluate --run "exported/$run" -n 10000 --kid 2000 "${data[@]}" --reference tiny.safetensors
done

# a refiner in place of the mask, and the shipped run; the second evaluation continues from the 10 000 images
jkoflow train    --config imagenet32-refiner "${data[@]}" --run runs/imagenet32-refiner --set sampler.steps=4
jkoflow export   --run runs/W4 "${guide[@]}" --guidance 3.3 --refiner runs/imagenet32-refiner --dtype int10 \
  --out exported/imagenet32-like-wide
jkoflow evaluate --run exported/imagenet32-like-wide -n 10000 --kid 2000 --set evaluate.nll=32 "${data[@]}" --reference tiny.safetensors
jkoflow evaluate --run exported/imagenet32-like-wide -n 50000 --set evaluate.nll=0 --set evaluate.floor=false "${data[@]}" \
  --reference tiny.safetensors
