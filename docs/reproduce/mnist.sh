#!/usr/bin/env bash
# JKO-iFlow in 48 dimensions: the settings of `make demo`, about six minutes of one core. zoo:mnist was trained with
# velocity.autonomous=false and probes that were held through a solve, so the present code gives other numbers.
set -euo pipefail

jkoflow encode   --config mnist
jkoflow train    --config mnist --run runs/mnist
jkoflow evaluate --run runs/mnist -n 10000 --kid 2000
jkoflow export   --run runs/mnist --dtype int10 --out exported/mnist
jkoflow evaluate --run runs/mnist -n 2000 --nfe-study 16,32
