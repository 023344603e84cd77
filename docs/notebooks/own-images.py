# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Your own images, from a tensor to an FID
#
# The images here come from a shipped model, so that the notebook needs no data set. Replace them
# by your own, uint8 (n, C, H, W). The training is far too short for good images; it shows the
# steps.

# %%
from pathlib import Path

import jkoflow

images = jkoflow.load("zoo:mnist").sample(300, seed=0)

# %% [markdown]
# `fit` encodes the images, trains a flow on their latents, and returns the model. The run
# directory `runs/own` is that of `jkoflow train`, and every command accepts it. A second call
# continues an interrupted training.

# %%
settings = {
    "train.iterations": 20,
    "train.batch_size": 64,
    "schedule.max_blocks": 2,
    "train.preview_every": 0,
}
model = jkoflow.fit(images, config="mnist", out=Path("runs") / "own", set=settings)
print(model)

# %% [markdown]
# `fid` compares generated images with the training images. An FID of few images is biased
# upwards, so compare it only with an FID of as many images.

# %%
generated = model.sample(300, seed=1)
print(f"FID(n=300) {jkoflow.fid(generated, images):.1f}")

# %% [markdown]
# The floor is the FID of the autoencoder alone. No flow on these latents can be expected below
# it.

# %%
reconstructed = model.decode(model.encode(images))
print(f"floor {jkoflow.fid(reconstructed, images):.1f}")
