"""Published peak throughputs of GPUs, dense, from the vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import UserError

_TERA = 1e12


@dataclass(frozen=True)
class Device:
    """GPU with its published peaks.

    Attributes:
        name: for tables and `--device-throughput`.
        fp32: peak of float32 without tensor cores, in FLOP/s.
        bf16: dense peak of bfloat16 tensor cores that accumulate in float32, in FLOP/s.
        memory: in bytes.
        source: data sheet with the peaks.
    """

    name: str
    fp32: float
    bf16: float
    memory: float
    source: str

    def peak(self, precision: str) -> float:
        """Return the peak of a precision, fp32 or bf16, in FLOP/s."""
        return self.bf16 if precision == "bf16" else self.fp32


DEVICES = (
    Device("A100", 19.5 * _TERA, 312 * _TERA, 80e9, "NVIDIA A100 80GB data sheet, SXM"),
    Device("H100", 67 * _TERA, 989 * _TERA, 80e9, "NVIDIA H100 data sheet, SXM"),
    Device("H200", 67 * _TERA, 989 * _TERA, 141e9, "NVIDIA H200 data sheet, SXM"),
    Device("L40S", 91.6 * _TERA, 362 * _TERA, 48e9, "NVIDIA L40S data sheet"),
    Device(
        "RTX 4090", 82.6 * _TERA, 165.2 * _TERA, 24e9, "NVIDIA Ada architecture white paper"
    ),
)


def device_of(text: str) -> Device:
    """Return the device of a name, or one of a given peak in TFLOP/s at either precision.

    Raises:
        UserError: the text is neither.
    """
    plain = text.lower().replace(" ", "").replace("-", "")
    for device in DEVICES:
        if plain == device.name.lower().replace(" ", ""):
            return device
    try:
        peak = float(text) * _TERA
    except ValueError:
        peak = 0.0
    if not 0 < peak < float("inf"):
        names = ", ".join(device.name for device in DEVICES)
        raise UserError(
            f"--device-throughput is {text}; expected {names}, or a peak in TFLOP/s; leave it "
            "out for this machine"
        )
    return Device(f"{text} TFLOP/s", peak, peak, 0.0, "--device-throughput")
