"""Devices by name, and settings of accelerate that have no effect."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.runtime import devices
from tests.pipeline.tiny import say

REFUSED = [
    ("ACCELERATE_MIXED_PRECISION", "bf16", "set train.precision=bf16"),
    ("ACCELERATE_MIXED_PRECISION", "fp16", "train.precision"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "set train.micro_batch"),
    ("ACCELERATE_USE_FSDP", "true", "without FSDP"),
    ("ACCELERATE_USE_DEEPSPEED", "TRUE", "without DeepSpeed"),
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend"),
]


@pytest.mark.parametrize(("name", "value", "advice"), REFUSED)
def test_settings_without_effect_are_refused_by_name(name: str, value: str, advice: str) -> None:
    with pytest.raises(UserError, match=f"{name} is {value.lower()}; expected .*{advice}"):
        devices.refuse_settings({name: value})


def test_settings_of_a_plain_launch_are_accepted() -> None:
    plain = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO",
             "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_USE_FSDP": "false",
             "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    devices.refuse_settings(plain)
    devices.refuse_settings({})


def test_a_command_refuses_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    code, _, last = say(capsys, "encode", "--config", "smoke")
    assert code == 2 and last.startswith("error: ACCELERATE_MIXED_PRECISION is bf16")


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "CPU", "gpu"])
def test_a_device_that_is_not_there_is_an_error(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    code, _, last = say(capsys, "encode", "--config", "smoke", "--device", name)
    assert code == 2
    assert last.startswith(f"error: --device is {name}; expected one of this machine: cpu")


def test_every_command_that_computes_has_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train"], ["evaluate"], ["likelihood"], ["toy2d"], ["autoencoder", "train"]):
        assert main.main([*words, "--help"]) == 0
        assert "--device" in capsys.readouterr().out
    assert main.main(["fetch", "--help"]) == 0
    assert "--device" not in capsys.readouterr().out


def test_slow_bfloat16_is_a_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "bf16_slowness", lambda _: 47.0)
    devices.warn_of_slow_bf16("fp32", Accelerator())
    assert capsys.readouterr().err == ""
    devices.warn_of_slow_bf16("bf16", Accelerator())
    assert "warning: bf16 takes 47 times as long as fp32" in capsys.readouterr().err
    monkeypatch.setattr(devices, "bf16_slowness", lambda _: 0.6)
    devices.warn_of_slow_bf16("bf16", Accelerator())
    assert capsys.readouterr().err == ""


def test_slowness_is_a_ratio_of_times() -> None:
    assert devices.bf16_slowness(torch.device("cuda")) == 1.0
    assert 0.05 < devices.bf16_slowness(torch.device("cpu")) < 10_000
