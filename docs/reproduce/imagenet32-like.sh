#!/usr/bin/env bash
# imagenet32-like, the stand-in for ImageNet-32 at width 64: 2.1 hours of one core from zoo:cifar10.
# DIR holds images in ImageNet-32's official layout: imagenet32-like.sh DIR
set -euo pipefail

dir=${1:?usage: imagenet32-like.sh DIR}
like=(--config imagenet32 --set data.path="$dir" --set velocity.width=64 --set velocity.classes=200
      --set evaluate.reference=tiny.safetensors)
jkoflow reference --config imagenet32 --set data.path="$dir" tiny.safetensors
jkoflow encode    --config imagenet32 --set data.path="$dir"

jkoflow train    "${like[@]}" --run runs/like-first --set train.init_from=zoo:cifar10 --set train.iterations=2500 \
  --set fm.snapshot_every=500
jkoflow evaluate --run runs/like-first -n 10000 --guide runs/like-first@500 --guidance 2.5 --set evaluate.nll=8
jkoflow train    "${like[@]}" --run runs/like --set train.init_from=runs/like-first --set train.lr=8e-3 --set train.iterations=12500
jkoflow evaluate --run runs/like -n 10000 --guide runs/like-first@500 --guidance 3.5 --set evaluate.nll=8
jkoflow export   --run runs/like --guide runs/like-first@500 --guidance 3.5 --out exported/imagenet32-like
