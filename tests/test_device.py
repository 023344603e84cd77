"""The strict device of the tests: it computes what the CPU does, and refuses what it should."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchdiffeq import odeint

from tests.device import NAME, DeviceError, register

DEVICE = register()


def network() -> nn.Sequential:
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(),
              nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(32, 4)]  # fmt: skip
    return nn.Sequential(*layers)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


REFUSED: dict[str, Callable[[torch.Tensor], object]] = {
    "float64": lambda a: a.double(),
    "float64 from the host": lambda a: draw(2).double().to(DEVICE),
    "float64 to the host": lambda a: a.to("cpu", torch.float64),
    "float64 made there": lambda a: torch.linspace(0, 1, 3, device=DEVICE, dtype=torch.float64),
    "complex128": lambda a: torch.zeros(2, device=DEVICE, dtype=torch.complex128),
    "two devices": lambda a: torch.cat([a, torch.ones(2, 3)]),
    "two devices in a sum": lambda a: a + torch.ones(2, 3),
    "two devices in a module": lambda a: nn.Linear(3, 2)(a),
    "host indexed there": lambda a: torch.ones(3)[torch.tensor([0], device=DEVICE)],
    "host result": lambda a: torch.add(a, a, out=torch.zeros(2, 3)),
    "host generator": lambda a: torch.randn(3, device=DEVICE, generator=torch.Generator()),
    "no kernel on MPS": lambda a: torch.linalg.eigvals(a[:, :2]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cuda_or_mps_refuse_is_an_error(what: str) -> None:
    with pytest.raises(RuntimeError, match="MPS has no|one device|same device|generator is on"):
        REFUSED[what](torch.ones(2, 3, device=DEVICE))


def test_what_cuda_and_mps_allow_is_none() -> None:
    a = torch.arange(6.0).reshape(2, 3).to(DEVICE)
    assert a.device.type == NAME and a.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (a.sum() * torch.tensor(2.0)).item() == 30  # a scalar of the host
    assert a[torch.tensor([1])].cpu().tolist() == [[3, 4, 5]]
    assert torch.ones(2).double().to(DEVICE, torch.float32).sum().item() == 2
    assert torch.tensor([1.0, 2.0], device=DEVICE).cpu().tolist() == [1, 2]
    assert copy.deepcopy(a).device == a.device


def test_views_share_memory_and_gradients_go_through_them() -> None:
    grads = []
    for place in ("cpu", DEVICE):
        x = torch.arange(4.0).to(place).requires_grad_()
        y = x * 1
        y[2:].mul_(x[1:3])
        y.view(2, 2).t()[0, :1].zero_()
        (y**2).sum().backward()
        grads.append(x.grad.cpu())
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", ["adam", "sgd", "muon"])
def test_optimisers_make_the_same_steps(name: str) -> None:
    def train(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        matrices = [p for p in net.parameters() if p.ndim == 2 or name != "muon"]
        make = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD, "muon": torch.optim.Muon}[name]
        optimiser = make(matrices, 1e-2)
        for _ in range(3):
            optimiser.zero_grad()
            net(x).square().mean().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
        return net[5].weight.detach().cpu()

    host = network()
    there = copy.deepcopy(host).to(DEVICE)
    x = draw(3, 2, 4, 4)
    torch.testing.assert_close(train(there, x.to(DEVICE)), train(host, x), rtol=1e-5, atol=1e-6)


def test_forward_mode_and_vmap_pass_through() -> None:
    host = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
    there = copy.deepcopy(host).to(DEVICE)
    z, tangents = draw(3, 6), draw(4, 3, 6, seed=1)

    def push(net: nn.Module, z: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda v: torch.func.jvp(net, (z,), (v,))[1]

    ours = torch.vmap(push(there, z.to(DEVICE)))(tangents.to(DEVICE))
    torch.testing.assert_close(ours.cpu(), torch.vmap(push(host, z))(tangents))


def test_attention_and_autocast() -> None:
    q = draw(2, 2, 5, 4)
    ours = F.scaled_dot_product_attention(*[q.to(DEVICE)] * 3).cpu()
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, q, q))
    host, x = network(), draw(3, 2, 4, 4)
    there = copy.deepcopy(host).to(DEVICE)
    with torch.autocast(NAME, torch.bfloat16):
        half = there(x.to(DEVICE))
    half.float().square().sum().backward()
    assert half.dtype == torch.bfloat16 and there[0].weight.grad.dtype == torch.float32
    torch.testing.assert_close(half.float().cpu(), host(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_ordinary_differential_equations(method: str) -> None:
    """dz/dt = −tz from 1: exp(−½) at t = 1. The solver's own time would be float64."""
    times = torch.tensor([0.0, 1.0], device=DEVICE)
    options = {"dtype": torch.float32} if method == "dopri5" else {"step_size": 0.1}
    z = odeint(lambda t, z: -t * z, torch.ones(2, device=DEVICE), times, method=method,
               options=options, rtol=1e-5, atol=1e-5)  # fmt: skip
    assert z[-1].tolist() == pytest.approx([0.60653] * 2, rel=1e-4)
    if method == "dopri5":
        with pytest.raises(DeviceError, match="MPS has no torch.float64"):
            odeint(lambda t, z: -t * z, torch.ones(2, device=DEVICE), times, method=method)
