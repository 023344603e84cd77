"""Text for people: metrics on one line, as rows, and as a table with the blocks and the cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def metrics_line(metrics: dict[str, Any]) -> str:
    """Format FID with its n, reference, seed and floor, and the other metrics, on one line."""
    rows = [f"{name} {value}" for name, value in metric_rows(metrics)]
    return "; ".join(" ".join(row.split()) for row in rows)


def sampling_text(sampling: Mapping[str, Any]) -> str:
    """Format guidance, guide, refiner, precision and blocks, as the end of a line.

    The defaults of a sampling plan's identity are left out.
    """
    text = ""
    if sampling["classes"] is not None or sampling["guide"] is not None:
        text += f", guidance {sampling['guidance']:g}"
    if sampling["guide"] is not None:
        text += f" by {sampling['guide']['name']}"
    if sampling["refiner"] is not None:
        text += f", refined by {sampling['refiner']['name']}"
    if sampling["precision"] != "fp32":
        text += f", in {sampling['precision']}"
    if sampling["first_blocks"] is not None:
        text += f", first {sampling['first_blocks']} blocks only"
    return text


def metrics_table(metrics: dict[str, Any], seconds: dict[str, float], reused: set[str]) -> str:
    """Format the blocks, the metrics of metrics.json and the cost, as aligned text.

    `seconds` are those of each step when it was done; an earlier command has done those in
    `reused`.
    """
    first = metrics["blocks"][0]
    times = first.get("objective") == "lfm" or first.get("gamma") is not None
    symbol = "γ" if times else "h"
    lines = [f"block{symbol:>7}   movement (W2)   Ter(k)   seconds   parameters"]
    for index, row in enumerate(metrics["blocks"]):
        step = row["gamma"] if row["h"] is None else row["h"]
        text = "free" if step is None else f"{step:.3g}"
        lines.append(
            f"{index:>5}{text:>7}{row['movement']:>16.3f}{row['ter']:>9.4f}{row['seconds']:>10.1f}"
            f"{row['parameters']:>13,}"
        )
    lines += ["", *(f"{name:<34}{value}" for name, value in metric_rows(metrics)), ""]
    for name, spent in seconds.items():
        note = "  (done before)" if name in reused else ""
        lines.append(f"{name:<34}{spent:.1f} s{note}")
    lines.append(f"{'peak memory':<34}{metrics['peak_memory_bytes'] / 2**30:.2f} GiB")
    return "\n".join(lines)


def metric_rows(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """Format the metrics as pairs of a name and a value with its conditions."""
    fid = metrics["fid"]
    conditions = f"seed {fid['seed']}{sampling_text(metrics['sampling'])}"
    rows = [(f"FID(n={fid['n']}, {fid['reference']})", f"{fid['value']:.2f}   ({conditions})")]
    if "rfid" in metrics:
        floor = metrics["rfid"]
        name = f"  reconstruction floor (n={floor['n']})"
        rows.append((name, f"{floor['value']:.2f}   ({floor['split']})"))
    if metrics["real_test_fid"] is not None:
        rows.append((f"  real test images (n={fid['n']})", f"{metrics['real_test_fid']:.2f}"))
    if "kid" in metrics:
        kid = metrics["kid"]
        note = f"({kid['against']}, n={kid['n']})"
        rows.append(("KID", f"{kid['value']:.5f} ± {kid['standard_error']:.5f}   {note}"))
        pair = f"{metrics['precision']:.3f} / {metrics['recall']:.3f}"
        rows.append(("precision / recall", f"{pair}   {note}"))
    if "nll_per_dim" in metrics:
        rows.append(("NLL per dim", _nll_text(metrics)))
    rows.append(("NFE a sample", str(metrics["nfe"])))
    return rows


def _nll_text(metrics: Mapping[str, Any]) -> str:
    """Format the NLL per dimension with its standard errors, its n, its unit and the inversion."""
    nll = metrics["nll"]
    text = f"{metrics['nll_per_dim']:.3f}"
    for name in ("image", "probe"):
        if nll.get(f"{name}_error") is not None:
            text += f" ± {nll[f'{name}_error']:.4f} ({name}s)"
    return f"{text}   (n={nll['n']}, {nll['unit']}; inversion MSE {nll['inversion_mse']:.1e})"
