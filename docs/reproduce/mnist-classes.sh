#!/usr/bin/env bash
# zoo:mnist-classes, class-conditional digits from mnist-fm: 35 minutes of one core.
# Run mnist-fm.sh first: it trains the start and the guide.
set -euo pipefail

jkoflow encode   --config mnist-classes
jkoflow train    --config mnist-classes --run runs/mnist-classes --set train.init_from=runs/mnist-fm-longer \
  --set train.iterations=4200 --set train.batch_size=256 --set train.lr=5e-3 --set latents.draws=2
jkoflow evaluate --run runs/mnist-classes -n 10000 --kid 10000 --guide runs/mnist-fm-guide --guidance 1.4 --set evaluate.nll=32
jkoflow export   --run runs/mnist-classes --guide runs/mnist-fm-guide --guidance 1.4 --dtype int10 --out exported/mnist-classes
jkoflow generate --run zoo:mnist-classes --class all --out mnist-classes.png
