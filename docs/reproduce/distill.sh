#!/usr/bin/env bash
# docs/ablations.md: the four blocks of zoo:mnist merged into two of one RK4 step each, under two minutes of one core.
set -euo pipefail

jkoflow encode   --config mnist
jkoflow distill  --run zoo:mnist --out runs/mnist-distilled --merge 2 --steps 1 --set train.iterations=1500
jkoflow evaluate --run runs/mnist-distilled -n 2000 --kid 2000
