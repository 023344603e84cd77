"""The trainer of autoencoders: it learns, resumes bit for bit, and does what the recipe says."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from autoencoders.base import to_float
from pipeline.autoencoder_training.adversary import R1_EVERY
from pipeline.autoencoder_training.trainer import AutoencoderTrainer
from pipeline.config.autoencoder import AutoencoderTraining
from tests.autoencoders.models import blobs, config, model
from tests.pipeline.autoencoder_training.trainers import run, trainer
from tests.ranks import Rank, mean_of


@pytest.mark.parametrize("flavour", ["kl", "vq"])
def test_it_learns(accelerator: Accelerator, flavour: str) -> None:
    training = trainer(accelerator, flavour, ema=0.8)
    terms = run(training, 40)
    first = sum(t["reconstruction"] for t in terms[:3]) / 3
    last = sum(t["reconstruction"] for t in terms[-3:]) / 3
    assert last < 0.6 * first
    finished = training.finished(blobs(16))
    x = to_float(blobs(16))
    with torch.no_grad():
        error = (finished.decode(finished.encode(x).mean) - x).abs().mean().item()
    assert error < 0.6 * first
    assert finished.fingerprint and not finished.training


@pytest.mark.parametrize(
    ("flavour", "optimizer"), [("kl", "adam"), ("vq", "adam"), ("kl", "muon")]
)
def test_a_resumed_training_equals_an_uninterrupted_one(
    accelerator: Accelerator, flavour: str, optimizer: str
) -> None:
    recipe: dict[str, Any] = {"adversarial_start": 2, "flip": True, "optimizer": optimizer}
    whole = trainer(accelerator, flavour, **recipe)
    run(whole, 6)
    half = trainer(accelerator, flavour, **recipe)
    run(half, 3)
    state = copy.deepcopy(half.state())
    resumed = trainer(accelerator, flavour, seed=99, **recipe)  # its own start is forgotten
    resumed.load_state(state)
    run(resumed, 3)
    for name in ("model", "average", "discriminator"):
        actual, expected = getattr(resumed, name), getattr(whole, name)
        for key, tensor in expected.state_dict().items():
            assert torch.equal(actual.state_dict()[key], tensor), f"{name} {key}"


def test_the_discriminator_starts_at_its_step(accelerator: Accelerator) -> None:
    training = trainer(accelerator, adversarial_start=2)
    start = copy.deepcopy(training.discriminator.state_dict())
    terms = run(training, 2)
    assert all("discriminator" not in t and "adversarial" not in t for t in terms)
    for key, tensor in training.discriminator.state_dict().items():
        assert torch.equal(tensor, start[key]), key
    (third,) = run(training, 1)
    assert {"discriminator", "adversarial", "matching"} <= set(third)
    changed = [
        k for k, v in training.discriminator.state_dict().items() if not torch.equal(v, start[k])
    ]
    assert changed


def test_without_its_weight_there_is_no_discriminator(accelerator: Accelerator) -> None:
    training = trainer(accelerator, adversarial_start=0, adversarial_weight=0.0)
    assert "discriminator" not in run(training, 1)[0]


def test_the_first_discriminator_loss_is_the_hinge(accelerator: Accelerator) -> None:
    """With logits near zero both hinges are near one; half their sum is one."""
    training = trainer(accelerator, adversarial_start=0)
    with torch.no_grad():
        for parameter in training.discriminator.main[-1].parameters():
            parameter.zero_()
    assert run(training, 1)[0]["discriminator"] == pytest.approx(1.0)


def test_dropout_follows_from_the_step(accelerator: Accelerator) -> None:
    """A resumed training draws the masks that it would have drawn, whatever torch's state."""
    outcomes = []
    for seed, pause in ((1, False), (2, True)):
        torch.manual_seed(seed)
        training = AutoencoderTrainer(
            config(dropout=0.5), AutoencoderTraining(iterations=4, batch_size=8), accelerator
        )
        run(training, 1)
        if pause:
            torch.rand(7)
        before = torch.get_rng_state()
        run(training, 1)
        assert torch.equal(torch.get_rng_state(), before)
        outcomes.append(torch.cat([p.detach().flatten() for p in training.model.parameters()]))
    assert torch.equal(*outcomes)


def test_a_frozen_encoder_drops_nothing(accelerator: Accelerator) -> None:
    recipe = AutoencoderTraining(iterations=4, batch_size=8, start="a file", decoder_only=True)
    training = AutoencoderTrainer(config(), recipe, accelerator, model(dropout=0.5).freeze())
    run(training, 1)
    x = to_float(blobs(8))
    assert torch.equal(training.model.encode(x).mean, training.model.encode(x).mean)
    assert training.model.decoder.training


@pytest.mark.parametrize(("discriminator", "side", "layers"), [("r1", 9, 1), ("patchgan", 6, 3)])
def test_images_that_no_discriminator_can_judge(
    accelerator: Accelerator, discriminator: str, side: int, layers: int
) -> None:
    recipe = AutoencoderTraining(
        iterations=10, adversarial_start=5, adversarial_weight=0.1, discriminator=discriminator,
        discriminator_layers=layers,
    )  # fmt: skip
    shape = config(image_shape=(1, side, side), canvas=0)
    with pytest.raises(
        ValueError, match=f"images are {side}x{side}; expected sides that every layer"
    ):
        AutoencoderTrainer(shape, recipe, accelerator)
    AutoencoderTrainer(shape, replace(recipe, adversarial_start=10), accelerator)  # never asked


def test_the_kl_term_is_the_closed_form(accelerator: Accelerator) -> None:
    training = trainer(accelerator, kl_weight=1.0)
    x = to_float(blobs(8))
    with torch.no_grad():
        moments = training.model.encode(x)
    assert moments.log_var is not None
    std = (0.5 * moments.log_var).exp()
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(moments.mean, std), torch.distributions.Normal(0.0, 1.0)
    )
    terms = training.step(blobs(8), torch.Generator().manual_seed(0))
    per_image = exact.sum().item() / 8
    named = [value for name, value in terms.items() if "kl" in name]
    assert any(
        value == pytest.approx(per_image, rel=1e-4)
        or value == pytest.approx(per_image / x[0].numel(), rel=1e-4)
        for value in named
    ), terms


def test_channels_that_hold_only_noise_are_dropped(accelerator: Accelerator) -> None:
    training = trainer(accelerator, prune=0.05)
    with torch.no_grad():
        average = training.average.average
        weight, bias = average["quant_conv.weight"], average["quant_conv.bias"]
        weight[[1, 3]] = 0.0  # the posterior of channel 1 is N(0, 1) whatever the image
        bias[[1, 3]] = 0.0
        bias[2] = -4.0  # channel 0 is sharp
    finished = training.finished(blobs(16))
    assert finished.latent_shape == (1, 4, 4)
    training.recipe = AutoencoderTraining(prune=0.0)
    assert training.finished(blobs(16)).latent_shape == (2, 4, 4)


def test_every_step_has_the_learning_rates_of_the_schedule(accelerator: Accelerator) -> None:
    training = trainer(
        accelerator, iterations=10, warmup=4, lr=1e-9, lr_final=0.1, discriminator_lr=0.3
    )
    for step in range(10):
        run(training, 1)
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 10))
        expected = 1e-9 * cosine * min(1.0, (step + 1) / 4)
        assert training.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        other = training.discriminator_optimizer.param_groups[0]["lr"]
        assert other == pytest.approx(0.3 * expected)


def test_a_loss_that_is_not_finite_raises(accelerator: Accelerator) -> None:
    training = trainer(accelerator)
    training.model.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match="loss is nan at step 0; expected a finite number; lower lr"
    ):
        run(training, 1)


def test_uneven_shares_give_the_gradient_of_the_whole_batch(accelerator: Accelerator) -> None:
    """Three images over two processes; a VQ autoencoder, which draws no noise."""

    def step(on: Any, images: torch.Tensor) -> tuple[AutoencoderTrainer, dict[str, float]]:
        training = trainer(on, "vq", batch_size=3, adversarial_weight=0.0, overshoot_weight=0.0)
        training.done = 1  # the codebook has started
        return training, training.step(images, torch.Generator())

    images = blobs(3)
    whole, terms = step(accelerator, images)
    gradients = [p.grad.flatten() for p in whole.model.parameters() if p.grad is not None]
    loss = torch.tensor([terms["reconstruction"] + terms["codebook"]])
    expected = torch.cat([*gradients, loss])
    ranks = [Rank(0, 2), Rank(1, 2)]
    for rank in ranks:
        step(rank, images[rank.process_index :: 2])
    torch.testing.assert_close(mean_of(ranks), expected, rtol=1e-3, atol=1e-5)


def test_the_kl_weight_grows_from_zero(accelerator: Accelerator) -> None:
    """With a warm-up as long as the training, a step's gradient has that step's share of it."""
    training = trainer(accelerator, kl_weight=0.6, kl_warmup=3, lr=1e-12)
    weights = []
    for _ in range(5):
        weights.append(training.loss.kl_weight(training.done))
        training.step(blobs(8), torch.Generator().manual_seed(0))
    assert weights == pytest.approx([0.2, 0.4, 0.6, 0.6, 0.6])
    assert trainer(accelerator, kl_weight=0.6).loss.kl_weight(0) == 0.6


def test_the_kl_weight_is_the_one_that_trains(accelerator: Accelerator) -> None:
    """A KL term whose warm-up has hardly begun leaves the same weights as none."""
    none, begun, full = (
        trainer(accelerator, kl_weight=w, kl_warmup=n) for w, n in ((0, 0), (9, 10**12), (9, 0))
    )
    for training in (none, begun, full):
        run(training, 2)
    a, b, c = (training.model.decoder.conv_in.weight for training in (none, begun, full))
    assert torch.allclose(a, b, atol=1e-7)
    assert not torch.allclose(a, c, atol=1e-4)


def test_an_output_beyond_the_grey_levels_is_pulled_back(accelerator: Accelerator) -> None:
    """White images and an output far beyond white: nothing to reconstruct, only to pull back."""
    white = torch.full_like(blobs(8), 255)
    bias = []
    for weight in (0.0, 0.01):
        training = trainer(accelerator, kl_weight=0.0, overshoot_weight=weight, warmup=0)
        with torch.no_grad():
            training.model.decoder.conv_out.bias.fill_(50.0)
        terms = training.step(white, torch.Generator().manual_seed(0))
        assert terms["reconstruction"] == 0.0
        assert terms["overshoot"] == pytest.approx(49.0**2, rel=0.2)
        bias.append(training.model.decoder.conv_out.bias.max().item())
    assert bias[0] == 50.0
    assert bias[1] < 50.0


def test_the_default_momentum_is_the_discriminators(accelerator: Accelerator) -> None:
    def weight(discriminator: str, momentum: float | None) -> torch.Tensor:
        training = trainer(accelerator, discriminator=discriminator, momentum=momentum)
        run(training, 3)
        return training.model.decoder.conv_in.weight.detach().clone()

    for discriminator, own in (("r1", 0.0), ("patchgan", 0.5)):
        assert torch.equal(weight(discriminator, None), weight(discriminator, own))
        assert not torch.equal(weight(discriminator, None), weight(discriminator, 0.9))


def test_settings_that_contradict_each_other_raise() -> None:
    with pytest.raises(ValueError, match="decoder_only needs training.start"):
        AutoencoderTraining(decoder_only=True)
    with pytest.raises(ValueError, match="iterations is 0; expected at least 1, or"):
        AutoencoderTraining(iterations=0, sharpen=True)


def test_mirrored_images_are_flipped_left_to_right(accelerator: Accelerator) -> None:
    images = blobs(16)
    drawn = torch.Generator().manual_seed(0)
    x, _ = trainer(accelerator, flip=True)._prepare(images, drawn)
    plain = to_float(images)
    kept, mirrored = ((x == y).flatten(1).all(1) for y in (plain, plain.flip(-1)))
    assert bool((kept | mirrored).all()) and 0 < int(mirrored.sum()) < 16


def test_the_terms_of_the_latents_have_their_weights(accelerator: Accelerator) -> None:
    x = to_float(blobs(8))
    for flavour, name, weight in (("kl", "kl", 0.5 / 100), ("vq", "codebook", 3.0)):
        loss = trainer(accelerator, flavour, kl_weight=0.5, codebook_weight=3.0).loss
        _, term, named = loss.latents(x, torch.zeros(8, *loss.model.latent_shape), 0)
        assert float(term.detach()) == pytest.approx(weight * named[name])


def test_the_noise_of_latents_is_relative_to_their_spread(accelerator: Accelerator) -> None:
    """Of a strength from U(0, 1) for each image, whose mean square is a third."""
    loss = trainer(accelerator, latent_noise=0.5).loss
    drawn = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 10.0])
    z = torch.randn(2000, 2, 4, 4, generator=drawn) * scale[:, None, None]
    added = (loss._with_noise(z, drawn) - z).std((0, 2, 3))
    torch.testing.assert_close(added, 0.5 * scale / 3**0.5, rtol=0.05, atol=0)


def test_the_r1_term_stands_for_the_steps_without_it(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = trainer(accelerator, discriminator="r1", r1_weight=5.0)
    monkeypatch.setattr(training, "_apply", lambda *_: None)
    real, fake, network = to_float(blobs(8)), to_float(blobs(8, seed=1)), training.discriminator
    training._step_discriminator(real, fake)
    weights = list(network.parameters())
    loss = network.loss(real, fake) + R1_EVERY * network.penalty(real)
    for weight, expected in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        torch.testing.assert_close(weight.grad, expected)
