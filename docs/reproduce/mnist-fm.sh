#!/usr/bin/env bash
# mnist-fm, flow matching in 192 dimensions with a guide of half the width: about an hour of one core.
set -euo pipefail

jkoflow encode --config mnist-fm
jkoflow train  --config mnist-fm --run runs/mnist-fm
jkoflow train  --config mnist-fm --run runs/mnist-fm-longer --set train.init_from=runs/mnist-fm \
  --set train.iterations=4000 --set train.batch_size=256 --set train.lr=5e-3
jkoflow train  --config mnist-fm --run runs/mnist-fm-guide --set name=mnist-fm-guide \
  --set velocity.width=32 --set train.iterations=1000

jkoflow export   --run runs/mnist-fm-longer --guide runs/mnist-fm-guide --guidance 2.5 --out exported/mnist-fm
jkoflow evaluate --run exported/mnist-fm -n 10000 --kid 10000 --set evaluate.nll=64
