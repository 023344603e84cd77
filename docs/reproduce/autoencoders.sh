#!/usr/bin/env bash
# The recipes of the shipped autoencoders (docs/autoencoders.md). DIR holds images in ImageNet-32's official layout.
# The first phases of mnist-kl are not kept as one configuration; the last line of its part is its decoder's second stage.
set -euo pipefail

dir=${1:?usage: autoencoders.sh DIR}
out=runs/autoencoders

# mnist-kl: the decoder
jkoflow autoencoder train --config mnist-decoder --set autoencoder_training.start=mnist-kl --out "$out/mnist-kl"

# mnist-kl-192: the model, then its decoder twice
jkoflow autoencoder train --config mnist --out "$out/mnist-first"
jkoflow autoencoder train --config mnist-192-decoder --set autoencoder_training.start="$out/mnist-first/autoencoder.safetensors" \
  --out "$out/mnist-second"
jkoflow autoencoder train --config mnist-192-decoder --set autoencoder_training.start="$out/mnist-second/autoencoder.safetensors" \
  --set autoencoder_training.iterations=7000 --set autoencoder_training.lr=2.0e-3 \
  --set autoencoder_training.discriminator_lr=0.4 --set autoencoder_training.discriminator_width=48 --out "$out/mnist-kl-192"

# mnist-kl-192-fine: from mnist-kl-192, then its decoder
jkoflow autoencoder train --config mnist-fine --out "$out/mnist-fine-first"
jkoflow autoencoder train --config mnist-192-decoder --set autoencoder_training.start="$out/mnist-fine-first/autoencoder.safetensors" \
  --set autoencoder_training.iterations=9000 --set autoencoder_training.discriminator_lr=0.3 \
  --set autoencoder_training.discriminator_width=48 --out "$out/mnist-kl-192-fine"

# 32x32 colour
jkoflow autoencoder train --config cifar10-16x16 --out "$out/rgb32-kl"
jkoflow autoencoder train --config cifar10 --out "$out/rgb32-kl-8x8"
jkoflow autoencoder train --config rgb32-general --set data.path="$dir" --out "$out/rgb32-kl-general"

# the shipped models
for config in mnist mnist-fm mnist-fine cifar10-16x16 cifar10; do
  jkoflow autoencoder evaluate --config "$config" -n 10000
done
jkoflow reference --config imagenet32 --set data.path="$dir" tiny.safetensors
jkoflow autoencoder evaluate --config rgb32-general --set data.name=imagenet32 --set 'data.also=[]' --set data.path="$dir" \
  --set data.test_split=train --set evaluate.reference=tiny.safetensors
