"""Devices by name, and settings of accelerate that have no effect."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands import launch
from accelerate.utils.launch import prepare_multi_gpu_env

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.runtime import devices
from tests.pipeline.tiny import ROOT, say

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


#: what `accelerate launch --use_fsdp --fsdp_version 2` sets by default
PLAIN_FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000", "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true", "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}  # fmt: skip
REFUSED_FSDP = [
    ("ACCELERATE_USE_FSDP", "1", "expected false or none"),
    ("FSDP_VERSION", "1", "expected 2; set fsdp_version: 2"),
    ("FSDP_VERSION", "", "expected 2"),
    ("FSDP_OFFLOAD_PARAMS", "true", "expected false"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "true", "lower train.micro_batch"),
    ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "no_wrap or transformer_based_wrap"),
    ("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP", "set DitBlock for a dit"),
    ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT", "expected full_state_dict or none"),
    ("FSDP_IGNORED_MODULES", "output", "every parameter is sharded"),
    ("FSDP_SHARDING_STRATEGY", "SHARD_GRAD_OP", "fsdp_reshard_after_forward"),
    ("FSDP_BACKWARD_PREFETCH", "BACKWARD_PRE", "expected no_prefetch"),
    ("FSDP_FORWARD_PREFETCH", "true", "version 2"),
]


@pytest.mark.parametrize(("name", "value", "words"), REFUSED_FSDP)
def test_settings_of_fsdp_without_effect_are_refused(name: str, value: str, words: str) -> None:
    devices.refuse_settings(PLAIN_FSDP, shards=True)
    environ = {**PLAIN_FSDP, name: value}
    if not value:
        del environ[name]
    with pytest.raises(UserError, match=words):
        devices.refuse_settings(environ, shards=True)


def test_settings_of_fsdp_are_those_of_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launcher sets the defaults above, and those of docs/cluster/fsdp.yaml are honoured."""
    for name in PLAIN_FSDP:
        monkeypatch.delenv(name, raising=False)

    def launched(*words: str) -> dict[str, str]:
        arguments = launch.launch_command_parser().parse_args([*words, "script.py"])
        arguments, _, _ = launch._validate_launch_command(arguments)
        environ = prepare_multi_gpu_env(arguments)
        assert environ["ACCELERATE_USE_FSDP"] == "true"
        return {key: value for key, value in environ.items() if "FSDP" in key}

    plain = launched("--use_fsdp", "--fsdp_version", "2", "--num_processes", "2")
    assert plain == PLAIN_FSDP
    documented = launched("--config_file", str(ROOT / "docs" / "cluster" / "fsdp.yaml"))
    devices.refuse_settings(documented, shards=True)
    assert documented["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "DitBlock"


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
