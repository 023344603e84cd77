#!/usr/bin/env bash
# docs/ablations.md: FID against samples seen, at a constant rate and without guidance.
set -euo pipefail

jkoflow encode   --config cifar10
jkoflow train    --config cifar10 --run runs/curve --set train.lr=6e-3 --set train.lr_final=1 --set fm.snapshot_every=1250
jkoflow evaluate --run runs/curve -n 2000 --seed 1 --curve --guidance 1
