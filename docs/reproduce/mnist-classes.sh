#!/usr/bin/env bash
# zoo:mnist-classes, class-conditional digits from zoo:mnist-fm: 35 minutes of one core.
# Run mnist-fm.sh first: it trains the guide.
set -euo pipefail

jkoflow encode   --config mnist-classes
jkoflow train    --config mnist-classes --run runs/mnist-classes --set train.init_from=zoo:mnist-fm \
  --set train.iterations=4200 --set train.batch_size=256 --set train.lr=5e-3 --set latents.draws=2
jkoflow evaluate --run runs/mnist-classes -n 10000 --kid 10000 --guide runs/mnist-fm-guide --guidance 1.4 --set evaluate.nll=32
jkoflow export   --run runs/mnist-classes --guide runs/mnist-fm-guide --guidance 1.4 --out exported/mnist-classes
jkoflow generate --run zoo:mnist-classes --class all --out mnist-classes.png
