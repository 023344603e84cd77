"""Every mistake of a file or of `--set` is named by its dotted key."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import packaged
from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.load import load, load_config
from pipeline.errors import UserError
from tests.pipeline.config.files import write


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.lrr=1", r"--set train\.lrr=1: unknown key train\.lrr; known here: .*\blr\b"),
        ("trian.lr=1", r"unknown key trian\.lr; known here: name, data, .*\btrain\b"),
        ("trian.data=1", r"unknown key trian\.data; known here: name, data"),
        ("jko.solvr.steps=1", r"unknown key jko\.solvr\.steps; known here: .*\bsolver\b"),
        ("train.lr=fast", r"train\.lr is 'fast'; expected float or list of float"),
        ("train.iterations=1.5", r"train\.iterations is 1\.5; expected int or list of int"),
        ("train.warm_start=maybe", r"train\.warm_start is 'maybe'; expected true or false"),
        ("data.limit=many", r"data\.limit is 'many'; expected int or null"),
        ("train=3", r"train is a section"),
        ("train.lr.x=3", r"train\.lr has no keys of its own"),
        ("train.lr", r"section\.key=value"),
        ("=3", r"section\.key=value"),
        ("train.iterations=[1,a]", r"train\.iterations is \[1, 'a'\]; expected"),
        ("jko.h=[[0.5]]", r"jko\.h is \[\[0\.5\]\]; expected list of float or null"),
        ("sampler.method=[]", r"sampler\.method is \[\]; expected at least one value"),
        ("data.also=mnist", r"data\.also is 'mnist'; expected list of text"),
        ("train.precision=fp8", r"train\.precision is 'fp8'; expected fp32 or bf16"),
        ("data.also=[mnist/test", r"its value is not readable YAML"),
    ],
)
def test_mistakes_of_overrides_are_named(override: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        load_config("smoke", [override])
    assert "\n" not in str(caught.value)


def test_an_unknown_key_of_an_architecture_is_named_with_its_neighbours() -> None:
    wrong = ["architecture.widht=64"]
    with pytest.raises(UserError, match=r"unknown key architecture\.widht; .*\bwidth\b"):
        load(AutoencoderConfig, "mnist-kl", wrong, packaged.AUTOENCODERS)
    with pytest.raises(UserError, match="it belongs to an autoencoder's file"):
        load_config("mnist", wrong)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train: {lrr: 1}", r"some\.yaml: unknown key train\.lrr"),
        ("colour: red", r"unknown key colour"),
        ("train: {lr: [a]}", r"train\.lr"),
        ("train: 3", r"train is a section"),
        ("data: {limit: x}", r"data\.limit"),
        ("- 1", "must hold sections with keys, not list"),
        ("just words", "must hold sections with keys, not str"),
        ("a: [", "not readable YAML"),
        ("a: {b: 1}\na: {c: 2}", "the key a is given twice; expected it once"),
        ("a: 1: 2", "not readable YAML"),
    ],
)
def test_mistakes_of_files_are_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("architecture.flavour=xy", "architecture.flavour is 'xy'; expected kl or vq"),
        ("training.precision=fp8", "training.precision is 'fp8'; expected fp32 or bf16"),
        ("training.optimizer=sgd", "training.optimizer is 'sgd'; expected adam or muon"),
        ("training.discriminator=wgan", "discriminator is 'wgan'; expected patchgan or r1"),
        ("training.latent_noise=-0.1", "latent_noise is -0.1; expected at least 0"),
        ("training.start=null", "training.decoder_only needs training.start, the weights"),
        ("training.ema=1", "training.ema is 1.0; expected at least 0 and below 1"),
        ("training.kl_warmup=-1", "training.kl_warmup is -1; expected at least 0"),
        ("training.momentum=1", "momentum is 1.0; expected at least 0 and below 1"),
        ("training.warmup=3", "training.warmup is no setting here: the warm-up of an autoencoder"),
        ("training.prune=0", "unknown key training.prune"),
        ("train.lr=1", "unknown key train.lr"),
    ],
)
def test_mistakes_of_autoencoders_are_named(override: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        load(AutoencoderConfig, "mnist-kl", [override], packaged.AUTOENCODERS)
