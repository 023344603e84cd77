"""Specifications of blocks, read from files."""

from __future__ import annotations

from typing import Any

import pytest

from flows.errors import FlowError
from flows.spec import BlockSpec


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": None}, "start is None in the block of a flow; expected another type"),
        ({"start": 0.5, "length": 2}, "start is 0.5 and length 2; expected a part"),
        ({"h": True}, "h is True"),
        ({"velocity": {"kind": ["mlp"]}}, r"kind is \['mlp'\] in the velocity of a flow"),
        ({"velocity": {"width": "wide"}}, "width is 'wide'"),
        ({"velocity": {"depth": 2.0}}, "depth is 2.0"),
        ({"solver": {"adjoint": 1}}, "adjoint is 1 in the solver of a flow"),
        ({"solver": {"speed": 1}}, "unknown key speed"),
        ({"solver": {"steps": [2]}}, r"steps is \[2\] in the solver of a flow"),
        ({"velocity": 5}, "the velocity of a flow is 5; expected a mapping"),
    ],
)
def test_a_specification_of_another_form_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FlowError, match=words):
        BlockSpec.from_dict(changes)


def test_values_of_the_right_types_are_read() -> None:
    plain = {"h": 1, "velocity": {"kind": "unet", "width": [8, 16]}, "solver": {"rtol": 1}}
    spec = BlockSpec.from_dict(plain)
    assert spec.h == 1 and spec.velocity.widths == (8, 16) and spec.solver.rtol == 1
    assert BlockSpec.from_dict(spec.to_dict()) == spec
