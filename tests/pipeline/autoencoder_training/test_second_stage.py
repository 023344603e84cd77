"""A decoder that is trained alone, on the latents of a finished encoder."""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator

from autoencoders.base import to_float
from autoencoders.taming import TamingAutoencoder
from autoencoders.weights import to_tensors
from pipeline.autoencoder_training.trainer import AutoencoderTrainer
from pipeline.config.autoencoder import AutoencoderTraining
from tests.autoencoders.models import blobs, config
from tests.pipeline.autoencoder_training.trainers import run, trainer


def finished_start(accelerator: Accelerator) -> TamingAutoencoder:
    training = trainer(accelerator)
    run(training, 3)
    return training.finished(blobs(16))


def second_stage(accelerator: Accelerator, start: TamingAutoencoder) -> AutoencoderTrainer:
    recipe = AutoencoderTraining(
        iterations=40, batch_size=8, lr=1e-3, warmup=2, start="a file", decoder_only=True,
        latent_noise=0.1, discriminator="r1", adversarial_start=1, adversarial_weight=0.1,
        feature_weight=0.0, discriminator_width=4, discriminator_layers=1, sharpen=True,
    )  # fmt: skip
    return AutoencoderTrainer(config(), recipe, accelerator, start)


def test_a_decoder_alone_is_trained_on(accelerator: Accelerator) -> None:
    start = finished_start(accelerator)
    training = second_stage(accelerator, start)
    terms = run(training, 5)
    assert "adversarial" not in terms[0] and "matching" not in terms[-1]
    assert {"adversarial", "discriminator", "penalty"} <= set(terms[4])  # R1 at steps 0, 4, 8, …
    finished = training.finished(blobs(16))
    before, after = start.state_dict(), finished.state_dict()
    for key, tensor in before.items():
        kept = key.startswith(("encoder.", "quant_conv."))
        assert torch.equal(after[key], tensor) == kept, key
    x = to_float(blobs(16))
    assert torch.equal(finished.encode(x).mean, start.encode(x).mean)
    assert finished.fingerprint != start.fingerprint
    # what was not trained is stored as it was, though half precision would round it
    stored = to_tensors(finished, exact=training.untrained)[0]
    for key, tensor in before.items():
        if key.startswith(("encoder.", "quant_conv.")):
            assert torch.equal(stored[key].float(), tensor), key
    assert stored["decoder.conv_in.weight"].dtype == torch.float16
    assert any(t.dtype == torch.float32 for k, t in stored.items() if k.startswith("encoder."))


def test_a_resumed_second_stage_equals_an_uninterrupted_one(accelerator: Accelerator) -> None:
    start = finished_start(accelerator)
    whole = second_stage(accelerator, start)
    run(whole, 6)
    half = second_stage(accelerator, start)
    run(half, 3)
    resumed = second_stage(accelerator, start)
    resumed.load_state(copy.deepcopy(half.state()))
    run(resumed, 3)
    for name in ("model", "average", "discriminator"):
        actual, expected = getattr(resumed, name), getattr(whole, name)
        for key, tensor in expected.state_dict().items():
            assert torch.equal(actual.state_dict()[key], tensor), f"{name} {key}"
