"""The three resizes against the projects that define them.

The values of torch-fidelity 0.4.0 and clean-fid 0.1.35 were measured on `ramp()`.
"""

from __future__ import annotations

import pytest
import torch

from eval.features.resize import MODES, prepare


def ramp():
    """A colour picture of 20 x 14 pixels with structure at every scale."""
    values = (torch.arange(3 * 20 * 14) * 7919 % 251).to(torch.uint8)
    return values.view(1, 3, 20, 14)


#: of the input of the network: mean, standard deviation, and pixels (1, 100, 50) and (2, 298, 298)
MEASURED = {
    "tensorflow": [-0.02105171, 0.3160429, 0.2941618, -0.4453125],
    "clean": [-0.02224607, 0.4168746, -0.3326866, -0.6565959],
}


@pytest.mark.parametrize("mode", MEASURED)
def test_resize_equals_the_project_that_defines_it(mode):
    x = prepare(ramp(), mode)
    assert x.shape == (1, 3, 299, 299) and x.dtype == torch.float32
    actual = [float(v) for v in (x.mean(), x.std(), x[0, 1, 100, 50], x[0, 2, 298, 298])]
    assert actual == pytest.approx(MEASURED[mode], abs=2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_grey_is_repeated_and_constants_stay(mode):
    x = prepare(torch.full((2, 1, 9, 9), 200, dtype=torch.uint8), mode)
    scaled = 200 / 127.5 - 1 if mode == "pytorch" else (200 - 128) / 128
    torch.testing.assert_close(x, torch.full((2, 3, 299, 299), scaled))
