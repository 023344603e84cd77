#!/usr/bin/env bash
# The recipes of the shipped autoencoders (docs/autoencoders.md). DIR holds images in ImageNet-32's official layout.
# The first phases of mnist-kl are not kept as one configuration; the last line of its part is its decoder's second stage.
set -euo pipefail

dir=${1:?usage: autoencoders.sh DIR}
out=runs/autoencoders

# mnist-kl: the decoder
jkoflow autoencoder train --config mnist-kl --out "$out/mnist-kl"

# mnist-kl-192: the model, then its decoder twice
jkoflow autoencoder train --config mnist-kl-192 --out "$out/mnist-first"
jkoflow autoencoder train --config mnist-kl-192-decoder --set training.start="$out/mnist-first/autoencoder.safetensors" \
  --out "$out/mnist-second"
jkoflow autoencoder train --config mnist-kl-192-decoder --set training.start="$out/mnist-second/autoencoder.safetensors" \
  --set training.iterations=7000 --set training.lr=2.0e-3 --set training.discriminator_lr=0.4 \
  --set training.discriminator_width=48 --out "$out/mnist-kl-192"

# mnist-kl-192-fine: from mnist-kl-192, then its decoder
jkoflow autoencoder train --config mnist-kl-192-fine --out "$out/mnist-fine-first"
jkoflow autoencoder train --config mnist-kl-192-decoder \
  --set training.start="$out/mnist-fine-first/autoencoder.safetensors" --set training.iterations=9000 \
  --set training.discriminator_lr=0.3 --set training.discriminator_width=48 --out "$out/mnist-kl-192-fine"

# 32x32 colour
jkoflow autoencoder train --config rgb32-kl --out "$out/rgb32-kl"
jkoflow autoencoder train --config rgb32-kl-8x8 --out "$out/rgb32-kl-8x8"
jkoflow autoencoder train --config rgb32-kl-general --set data.path="$dir" --out "$out/rgb32-kl-general"

# the shipped models
for name in mnist-kl mnist-kl-192 mnist-kl-192-fine rgb32-kl rgb32-kl-8x8; do
  jkoflow autoencoder evaluate --config "$name" --weights "$name" -n 10000
done
jkoflow reference --config imagenet32 --set data.path="$dir" tiny.safetensors
jkoflow autoencoder evaluate --config rgb32-kl-general --set data.name=imagenet32 --set 'data.also=[]' \
  --set data.path="$dir" --set data.test_split=train --reference tiny.safetensors
