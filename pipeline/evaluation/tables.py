"""What people read at the end: one line, a table, and a plot of the movement per block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.runs.passes import step_of


def headline(metrics: dict[str, Any]) -> str:
    """FID with its n, reference, seed and floor, on one line."""
    fid = metrics["fid"]
    text = f"FID(n={fid['n']}, {fid['reference']}) = {fid['value']:.2f}, seed {fid['seed']}"
    text += guidance_of(fid)
    if "first_blocks" in fid:
        text += f", first {fid['first_blocks']} blocks only"
    if "rfid" in metrics:
        text += f"; reconstruction floor {metrics['rfid']['value']:.2f}"
    if metrics.get("real_test_fid") is not None:
        text += f"; real test images {metrics['real_test_fid']:.2f}"
    if "kid" in metrics:
        kid = metrics["kid"]
        text += (
            f"; KID {kid['value']:.5f} ± {kid['standard_error']:.5f}, precision "
            f"{metrics['precision']:.3f}, recall {metrics['recall']:.3f} ({kid['against']}, "
            f"n={kid['n']})"
        )
    if "nll_per_dim" in metrics:
        text += f"; NLL {metrics['nll_per_dim']:.3f} nats per latent dimension"
    return f"{text}; {metrics['nfe']} evaluations a sample ({fid['extractor']})"


def guidance_of(told: Mapping[str, Any]) -> str:
    """Guidance, guide, refiner and half precision of what was generated, as the end of a line."""
    half = f", refined by {told['refiner']['name']}" if told.get("refiner") else ""
    half += f", in {told['sampled_in']}" if told.get("sampled_in") else ""
    if told.get("guidance") is None:
        return half
    guide = f" by {told['guide']['name']}" if told.get("guide") else ""
    return f", guidance {told['guidance']:g}{guide}{half}"


def table(metrics: dict[str, Any], seconds: dict[str, float], reused: set[str]) -> str:
    """The blocks, the numbers and the cost, as aligned text.

    Args:
        metrics: as in metrics.json.
        seconds: step → seconds it took when it was done.
        reused: steps that were already done before this run of the command.
    """
    first = metrics["blocks"][0]
    times = first.get("objective") == "lfm" or first.get("gamma") is not None
    symbol = "γ" if times else "h"
    lines = [f"block{symbol:>7}   movement (W2)   Ter(k)   seconds   parameters"]
    for index, row in enumerate(metrics["blocks"]):
        weight = step_of(row)
        text = "free" if weight is None else f"{weight:.3g}"
        lines.append(
            f"{index:>5}{text:>7}{row['movement']:>16.3f}{row['ter']:>9.4f}{row['seconds']:>10.1f}"
            f"{row['parameters']:>13,}"
        )
    lines += ["", *(f"{name:<34}{value}" for name, value in numbers(metrics)), ""]
    for step, spent in seconds.items():
        note = "  (done before)" if step in reused else ""
        lines.append(f"{step:<34}{spent:.1f} s{note}")
    lines.append(f"{'peak memory':<34}{metrics['peak_memory_bytes'] / 2**30:.2f} GiB")
    return "\n".join(lines)


def numbers(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured, as pairs of a name and a value with what belongs to it."""
    fid = metrics["fid"]
    made = f"seed {fid['seed']}"
    made += guidance_of(fid)
    rows = [(f"FID(n={fid['n']}, {fid['reference']})", f"{fid['value']:.2f}   ({made})")]
    if "rfid" in metrics:
        floor = metrics["rfid"]
        rows.append(
            (
                f"  reconstruction floor (n={floor['n']})",
                f"{floor['value']:.2f}   ({floor['split']})",
            )
        )
    if metrics.get("real_test_fid") is not None:
        rows.append((f"  real test images (n={fid['n']})", f"{metrics['real_test_fid']:.2f}"))
    if "kid" in metrics:
        kid = metrics["kid"]
        note = f"({kid['against']}, n={kid['n']})" if "against" in kid else f"(n={kid['n']})"
        rows.append(("KID", f"{kid['value']:.5f} ± {kid['standard_error']:.5f}   {note}"))
        rows.append(
            (
                "precision / recall",
                f"{metrics['precision']:.3f} / {metrics['recall']:.3f}   {note}",
            )
        )
    if "nll_per_dim" in metrics:
        nll = metrics["nll"]
        note = f"nats a latent dimension, n={nll['n']}, inversion MSE {nll['inversion_mse']:.1e}"
        rows.append(("NLL per dim", f"{metrics['nll_per_dim']:.3f}   ({note})"))
    rows.append(("NFE a sample", str(metrics["nfe"])))
    return rows


