#!/usr/bin/env bash
# zoo:cifar10, class-conditional flow matching guided by its own early state: two hours of two cores.
set -euo pipefail

jkoflow encode --config cifar10
torchrun --standalone --nproc_per_node 2 -m pipeline train -r runs/cifar10 --config cifar10
torchrun --standalone --nproc_per_node 2 -m pipeline train -r runs/cifar10-longer --config cifar10 \
  --set train.init_from=runs/cifar10 --set train.iterations=15000 --set train.batch_size=256

torchrun --standalone --nproc_per_node 2 -m pipeline evaluate -r runs/cifar10-longer -n 10000 \
  --guide runs/cifar10@2500 --guidance 2.5
jkoflow export   --run runs/cifar10-longer --guide runs/cifar10@2500 --guidance 2.5 --dtype int10 --out exported/cifar10
jkoflow evaluate --run exported/cifar10 -n 2000 --seed 1 --kid 2000 --set evaluate.nll=16
jkoflow evaluate --run exported/cifar10 -n 2000 --seed 1 --nfe-study 16,32,64
