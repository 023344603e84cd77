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
# # First pictures
#
# This notebook samples images from shipped models. It takes a minute on two CPU cores and needs
# no download.

# %%
import matplotlib.pyplot as plt
import torch

import jkoflow


def show(images: torch.Tensor, columns: int) -> None:
    """Show images uint8 (n, C, H, W) as a grid."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(columns, rows), squeeze=False)
    for axis, image in zip(axes.flat, images, strict=False):
        axis.imshow(image.permute(1, 2, 0).squeeze(), cmap="gray")
    for axis in axes.flat:
        axis.axis("off")
    plt.show()


# %% [markdown]
# `load` opens a run directory or a shipped model. The model knows its guide, its solver and its
# classes.

# %%
model = jkoflow.load("zoo:mnist-classes")
print(model)
digits = model.sample(20, classes="all", seed=0)
show(digits, columns=10)

# %% [markdown]
# The same seed gives the same bytes. These are also the bytes of `jkoflow generate --run
# zoo:mnist-classes -n 20 --class all --seed 0 --npz digits.npz`.

# %%
assert torch.equal(digits, model.sample(20, classes="all", seed=0))

# %% [markdown]
# A larger guidance weight gives clearer digits with less variety.

# %%
for guidance in (1.0, 1.4, 3.0):
    show(model.sample(10, classes=3, guidance=guidance, seed=1), columns=10)

# %% [markdown]
# The path from noise to an image is smooth. Two noises on the sphere have images in between.

# %%
shape = model.latent_shape
a, b = torch.randn((2, *shape), generator=torch.Generator().manual_seed(4))
show(model.sample(noise=jkoflow.interpolate(a, b, 10), classes=8), columns=10)
