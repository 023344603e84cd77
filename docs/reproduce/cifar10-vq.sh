#!/usr/bin/env bash
# docs/comparison.md: CIFAR-10 without classes in the latents (3, 8, 8) of a VQ autoencoder, one core.
set -euo pipefail

jkoflow autoencoder train --config rgb32-vq-8x8 --out runs/vq

vq=(--set autoencoder.weights=runs/vq/autoencoder.safetensors)
none=(--set velocity.classes=0 --set generate.guidance=null)
fm=(--config cifar10 "${vq[@]}" "${none[@]}" --set fm.snapshot_every=0 --set sampler.steps=24)
jkoflow encode --config cifar10 "${vq[@]}"
jkoflow train  "${fm[@]}" --run runs/vq-first --set train.iterations=4200
jkoflow train  "${fm[@]}" --run runs/vq-flow --init-from runs/vq-first --set train.iterations=7000 --set train.lr=5e-3
jkoflow train  --config cifar10-jko "${vq[@]}" "${none[@]}" --run runs/vq-jko --init-from runs/vq-flow
jkoflow train  --config cifar10-refiner "${vq[@]}" --run runs/vq-refiner --set sampler.steps=4

evaluate=(--set generate.precision=bf16)
for run in vq-flow vq-jko; do
  jkoflow evaluate --run "runs/$run" -n 1000 --seed 1 --kid 1000 "${evaluate[@]}"
done
jkoflow evaluate --run runs/vq-jko -n 1000 --seed 1 --kid 1000 --refiner runs/vq-refiner "${evaluate[@]}" --set evaluate.nll=0
jkoflow evaluate --run runs/vq-jko -n 10000 "${evaluate[@]}" --set evaluate.nll=0
