#!/usr/bin/env bash
# zoo:mnist-fine, flow matching in finer latents from mnist-fm: 71 minutes of one core. Run mnist-fm.sh first.
set -euo pipefail

jkoflow encode --config mnist-fine
jkoflow train  --config mnist-fine --run runs/mnist-fine-first --init-from runs/mnist-fm-longer
jkoflow train  --config mnist-fine --run runs/mnist-fine --set train.init_from=runs/mnist-fine-first \
  --set train.iterations=3600 --set matching.times=uniform --set latents.draws=2
jkoflow train  --config mnist-fine --run runs/mnist-fine-guide --set name=mnist-fine-guide \
  --set velocity.width=32 --set train.iterations=1000 --set train.batch_size=128

jkoflow export   --run runs/mnist-fine --guide runs/mnist-fine-guide --guidance 2 --dtype int10 --out exported/mnist-fine
jkoflow evaluate --run exported/mnist-fine -n 10000 --kid 10000 --set evaluate.nll=64
