"""The budget of every training of a benchmark, optimiser seconds or batches, and its clock."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

from pipeline.errors import UserError

_FORM = re.compile(r"(\d+(?:\.\d+)?)\s*(s|seconds|b|batches)")


@dataclass(frozen=True)
class Budget:
    """Budget of one training.

    Attributes:
        amount: seconds of the optimiser's steps, or batches; positive. On a CPU they are seconds
            of the processors, which other programs do not lengthen.
        unit: seconds or batches.
    """

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a budget such as `60s`, `60 seconds`, `2000b` or `2000 batches`.

        Raises:
            UserError: the text has another form, or the amount is 0.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None:
            raise UserError(
                f"--budget is {text!r}; expected a number with its unit, such as 60s or "
                "2000batches"
            )
        amount, unit = float(match[1]), "seconds" if match[2].startswith("s") else "batches"
        if amount <= 0 or (unit == "batches" and amount != int(amount)):
            raise UserError(
                f"--budget is {text}; expected more than 0 seconds, or a whole number of batches "
                "from 1 on"
            )
        return cls(amount, unit)

    def __str__(self) -> str:
        """Return the budget in words, which `parse` reads."""
        return f"{self.amount:.15g} {self.unit}"

    def part(self, fraction: float) -> Budget:
        """Return a fraction of the budget, at least one batch."""
        amount = self.amount * fraction
        return Budget(amount if self.unit == "seconds" else max(1, int(amount)), self.unit)

    def spent(self, batches: int, seconds: float) -> float:
        """Return the fraction of the budget that a training has used."""
        return (seconds if self.unit == "seconds" else batches) / self.amount


def used_seconds(device: torch.device) -> float:
    """Return the seconds that this process has used, from an arbitrary origin.

    On a CPU they are those of its processors, all threads together. A busy machine does not change
    them. On another device they are those of the clock.
    """
    return time.process_time() if device.type == "cpu" else time.perf_counter()
