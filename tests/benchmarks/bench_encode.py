"""Images per second from images to latents: plain loops over a taming VQModel, and ours.

    python -m tests.benchmarks.bench_encode [--images 128] [--rounds 5]

A VQModel of taming's own networks is encoded with in the three ways that scripts do it: calling
the model (which decodes too), calling its `encode` (which quantises, by a table of one-hot
vectors), and its encoder alone; each with autograd, as a plain loop has it, and without. Ours is
`TamingAutoencoder.encode` as `jkoflow encode` calls it: inference mode, the contiguous layout
(channels-last is timed beside it), nothing decoded or quantised. All alternate, processor time is
taken, medians are compared; latents must agree to 1e-5.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from autoencoders.architecture import TamingConfig
from autoencoders.taming import TamingAutoencoder

MODELS = {
    "small, 32x32": TamingConfig(
        "vq", (3, 32, 32), ch=32, ch_mult=(1, 2, 4), n_embed=1024, embed_dim=4, z_channels=4
    ),
    "LDM VQ-f4, 32x32": TamingConfig(
        "vq", (3, 32, 32), ch=128, ch_mult=(1, 2, 4), num_res_blocks=2, n_embed=8192,
        embed_dim=3, z_channels=3, resolution=256,
    ),
}  # fmt: skip


def ways(model: TamingAutoencoder) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name → a way from a batch of images to its pre-quantised latents."""
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)

    def encoder(x: Tensor) -> Tensor:
        return model.quant_conv(model.encoder(x))

    def quantising(x: Tensor) -> Tensor:
        h = encoder(x)
        model.quantize(h)
        return h

    def forward(x: Tensor) -> Tensor:
        h = encoder(x)
        model.decoder(model.post_quant_conv(model.quantize(h)[0]))
        return h

    @torch.no_grad()
    def forward_without(x: Tensor) -> Tensor:
        return forward(x)

    @torch.no_grad()
    def without_autograd(x: Tensor) -> Tensor:
        return encoder(x)

    @torch.no_grad()
    def quantising_without(x: Tensor) -> Tensor:
        h = encoder(x)
        model.quantize(h)
        return h

    @torch.inference_mode()
    def ours(x: Tensor) -> Tensor:
        return model.encode(x).mean

    @torch.inference_mode()
    def channels_last(x: Tensor) -> Tensor:
        return other.encode(x.contiguous(memory_format=torch.channels_last)).mean.contiguous()

    return {
        "plain: model(x)": forward,
        "plain: model(x), no_grad": forward_without,
        "plain: model.encode(x)": quantising,
        "plain: model.encode(x), no_grad": quantising_without,
        "plain: encoder": encoder,
        "plain: encoder, no_grad": without_autograd,
        "jkoflow, channels-last": channels_last,
        "jkoflow": ours,
    }


def measure(name: str, config: TamingConfig, n: int, batch: int, rounds: int) -> None:
    """Print a table of one model."""
    torch.manual_seed(0)
    model = TamingAutoencoder(config).eval()
    images = (torch.rand(n, *config.image_shape) * 2 - 1).split(batch)
    seconds: dict[str, list[float]] = {}
    compared = ways(model)
    expected, gap = None, 0.0
    for round_ in range(rounds + 1):  # the first warms up
        for way, function in compared.items():
            start = time.process_time()
            latents = torch.cat([function(x).detach() for x in images])
            if round_:
                seconds.setdefault(way, []).append(time.process_time() - start)
            expected = latents if expected is None else expected
            gap = max(gap, (latents - expected).abs().max().item())
    ours = statistics.median(seconds["jkoflow"])
    print(f"{name}: {n} images in batches of {batch}, {torch.get_num_threads()} threads")
    for way, spent in seconds.items():
        median = statistics.median(spent)
        rate = n / median * torch.get_num_threads()
        print(f"  {way:31s} {rate:8.1f} images/s  jkoflow is {median / ours:5.2f} times as fast")
    print(f"  largest difference of a latent: {gap:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description="plain loops over a VQModel against jkoflow")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for name, config in MODELS.items():
        measure(name, config, args.images, args.batch, args.rounds)


if __name__ == "__main__":
    main()
