"""Checkpoints: what comes back is what was saved, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.storage.checkpoints import load_checkpoint, save_checkpoint


def assert_equal(a: Any, b: Any) -> None:
    assert type(a) is type(b) or (isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)))
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


STATE: dict[str, Any] = {
    "step": 7,
    "lr": 0.1 + 0.2,
    "none": None,
    "flags": [True, False],
    "empty": {},
    "nested": {"a": {3: torch.arange(3), "3": torch.tensor(1.5, dtype=torch.float64)}},
    "half": torch.tensor([1.0, float("inf")], dtype=torch.bfloat16),
    "shared": [torch.ones(2, 2).t(), torch.zeros(0, 4)],
}


def test_a_state_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, STATE)
    assert_equal(load_checkpoint(path), STATE)


def test_equal_states_have_equal_bytes(tmp_path: Path) -> None:
    first, second = save_checkpoint(tmp_path / "a", STATE), save_checkpoint(tmp_path / "b", STATE)
    assert first == second and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_restored_optimiser_continues_bit_for_bit(tmp_path: Path) -> None:
    def training() -> tuple[torch.nn.Linear, torch.optim.Adam]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.Adam(model.parameters(), 0.01)

    def run(model: torch.nn.Linear, optimizer: torch.optim.Adam, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    whole, optimizer = training()
    run(whole, optimizer, range(6))
    model, optimizer = training()
    run(model, optimizer, range(3))
    path = tmp_path / "half"
    save_checkpoint(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed, optimizer = training()
    state = load_checkpoint(path)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    run(resumed, optimizer, range(3, 6))
    assert torch.equal(resumed.weight, whole.weight) and torch.equal(resumed.bias, whole.bias)


def test_every_flipped_bit_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_checkpoint(path, {"x": torch.arange(4.0), "step": 3})
    whole = path.read_bytes()
    accepted = []
    for place in range(0, len(whole)):
        data = bytearray(whole)
        data[place] ^= 4
        path.write_bytes(data)
        try:
            state = load_checkpoint(path)
        except UserError:
            continue
        # a flip that does not change what is read (such as white space) does no harm
        if not torch.equal(state["x"], torch.arange(4.0)) or state["step"] != 3:
            accepted.append(place)
    assert not accepted


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_a_user_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "state"
    save_checkpoint(path, STATE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="is damaged .*, which trains the block again"):
        load_checkpoint(path)


def test_an_absent_or_other_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "nothing")
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(tmp_path / "foreign")
