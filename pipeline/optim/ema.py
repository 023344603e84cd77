"""An exponential moving average of a module's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flows.errors import FlowError


class Ema:
    """Keeps θ̄ ← d θ̄ + (1 − d) θ beside a module; the averaged weights are what is used afterwards.

    The decay warms up, d_n = min(decay, (1 + n) / (10 + n)) at update n, so that the average
    forgets the initial weights even in a short training.

    Args:
        module: whose parameters to follow.
        decay: limit of d, in [0, 1).
        warmup: whether the decay starts small.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise FlowError(f"the EMA decay must lie in [0, 1), found {decay}")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.average = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters()
        }

    def current_decay(self) -> float:
        """The decay that the next update uses."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes in the module's present parameters."""
        weight = 1 - self.current_decay()
        averages, parameters = self._pairs(module)
        torch._foreach_lerp_(averages, parameters, weight)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrites the module's parameters with the average, for good."""
        averages, parameters = self._pairs(module)
        torch._foreach_copy_(parameters, averages)

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """Within the context the module carries the average; afterwards its own weights again."""
        own = {name: value.detach().clone() for name, value in module.named_parameters()}
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    parameter.copy_(own[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only, fit for safetensors: the averages and the number of updates."""
        state = {f"average.{name}": value for name, value in self.average.items()}
        return {**state, "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` gave.

        Raises:
            FlowError: the names are those of another module.
        """
        names = {f"average.{name}" for name in self.average} | {"updates"}
        if set(state) != names:
            odd = ", ".join(sorted(set(state) ^ names)[:3])
            raise FlowError(f"the EMA state belongs to another module (see {odd})")
        for name, value in self.average.items():
            value.copy_(state[f"average.{name}"])
        self.updates = int(state["updates"])

    def _pairs(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Averages and parameters in the same order."""
        parameters = dict(module.named_parameters())
        if parameters.keys() != self.average.keys():
            raise FlowError("the EMA follows a module with other parameters")
        return list(self.average.values()), [parameters[name].detach() for name in self.average]
