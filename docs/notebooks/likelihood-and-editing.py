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
# # Likelihood, inversion and editing
#
# A flow is invertible: an image has one noise, and the noise gives the image back up to the
# error of the solver.

# %%
import torch

import jkoflow

model = jkoflow.load("zoo:mnist-classes")
digits = model.sample(4, classes="7", seed=0)

# %% [markdown]
# `invert` returns the noise and measures the inversion error: the mean square difference between
# the latents and the latents that come back.

# %%
inversion = model.invert(digits, classes="7")
print("inversion error", inversion.error.tolist())

# %% [markdown]
# Noise of two images, and images of the noises between them:

# %%
between = jkoflow.interpolate(inversion.noise[0], inversion.noise[1], 5)
images = model.sample(noise=between, classes="7")
print(tuple(images.shape))

# %% [markdown]
# `edit` inverts part of the way and samples with another class. A larger strength keeps less of
# the image.

# %%
nines = model.edit(digits, to="9", strength=0.6, classes="7")
changed = (nines.float() - digits.float()).abs().mean()
print(f"mean change of a pixel {changed:.1f} of 255")

# %% [markdown]
# `log_prob` is the log-likelihood of latents, in nats. With Hutchinson's estimator each value
# has a standard error. Noise is far less likely than a digit.

# %%
source = torch.Generator().manual_seed(0)
noise = torch.randint(0, 256, digits.shape, dtype=torch.uint8, generator=source)
for name, pictures in (("digits", digits), ("noise", noise)):
    result = model.log_prob(pictures, classes="7", divergence="hutchinson", probes=4)
    error = result.standard_error.mean()
    print(f"{name}: {result.value.mean():.0f} nats, standard error of the probes {error:.1f}")
