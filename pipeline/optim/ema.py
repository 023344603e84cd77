"""The exponential moving average of a module's parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average θ̄ ← d θ̄ + (1 − d) θ of a module's parameters θ.

    The decay of update n is d_n = min(decay, (1 + n) / (10 + n)), so that the average forgets the
    initial weights even in a short training. The average starts at the present parameters.

    Raises:
        ValueError: the decay lies outside [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the EMA decay is {decay}; expected a number in [0, 1)")
        self.decay, self.updates = decay, 0
        self.average = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters()
        }

    def current_decay(self) -> float:
        """Return the decay d_n of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's present parameters."""
        weight = 1 - self.current_decay()
        torch._foreach_lerp_(*self._pairs(module), weight)
        self.updates += 1

    @torch.no_grad()
    def restart(self, module: nn.Module) -> None:
        """Set the average to the module's present parameters; the count of updates stays."""
        torch._foreach_copy_(*self._pairs(module))

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with the average."""
        averages, parameters = self._pairs(module)
        torch._foreach_copy_(parameters, averages)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages and the count of updates as tensors, fit for safetensors."""
        state = {f"average.{name}": value for name, value in self.average.items()}
        return {**state, "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: the parameter names are those of another module.
        """
        names = {f"average.{name}" for name in self.average} | {"updates"}
        if set(state) != names:
            odd = ", ".join(sorted(set(state) ^ names)[:3])
            raise ValueError(
                f"the EMA state belongs to another module; expected the same parameters, but "
                f"these are in one of the two only: {odd}"
            )
        for name, value in self.average.items():
            value.copy_(state[f"average.{name}"])
        self.updates = int(state["updates"])

    def _pairs(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Return the averages and the module's parameters in the same order."""
        parameters = dict(module.named_parameters())
        if parameters.keys() != self.average.keys():
            odd = ", ".join(sorted(parameters.keys() ^ self.average.keys())[:3])
            raise ValueError(
                f"the module has other parameters than the one averaged so far (see {odd}); "
                "expected the same module"
            )
        return list(self.average.values()), [parameters[name].detach() for name in self.average]
