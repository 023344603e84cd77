"""The log of a training: means, order, and what a resumed run drops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage.training_log import TrainingLog


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_rows_are_means_since_the_last_row(tmp_path: Path) -> None:
    with TrainingLog(tmp_path) as log:
        for total in (1.0, 2.0, 6.0):
            log.add({"total": total, "norm": 2 * total})
        log.flush(0, 3, 3, seconds=1.5)
        log.add({"total": 10.0})
        log.flush(0, 4, 4)
    first, second = rows(tmp_path)
    assert first["total"] == pytest.approx(3.0) and first["norm"] == pytest.approx(6.0)
    assert (first["block"], first["step"], first["seconds"]) == (0, 3, 1.5)
    assert second["total"] == pytest.approx(10.0) and "norm" not in second


def test_rewinding_drops_later_rows_and_partial_lines(tmp_path: Path) -> None:
    with TrainingLog(tmp_path) as log:
        for block, step in ((0, 2), (0, 4), (1, 2), (1, 4), (1, 6)):
            log.add({"total": 1.0})
            log.flush(block, step, step)
        with open(tmp_path / "log.jsonl", "a") as file:
            file.write('{"block": 1, "st')
        log.rewind(1, 4)
        kept = [(row["block"], row["step"]) for row in rows(tmp_path)]
        assert kept == [(0, 2), (0, 4), (1, 2), (1, 4)]
        log.add({"total": 1.0})
        log.flush(1, 6, 6)
    assert [r["step"] for r in rows(tmp_path)] == [2, 4, 2, 4, 6]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with TrainingLog(tmp_path, active=False) as log:
        log.rewind(0, 0)
        log.add({"total": 1.0})
        log.flush(0, 1, 1)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_knows_its_rows(tmp_path: Path) -> None:
    """Rows of the same step that came after the checkpoint are written again, so they go."""
    with TrainingLog(tmp_path) as log:
        log.write({"block": 0, "step": 4})
        state = log.state()
        log.write({"block": 0, "step": 4, "event": "finished"})
    with TrainingLog(tmp_path) as log:
        log.rewind(0, 4)
        log.restore(state)
        assert [row.get("event") for row in rows(tmp_path)] == [None]
        log.write({"block": 0, "step": 4, "event": "finished"})
    assert [row.get("event") for row in rows(tmp_path)] == [None, "finished"]


def test_lines_of_another_form_are_dropped(tmp_path: Path) -> None:
    lines = ['{"block": 0, "step": 1}', '{"block": "x", "step": 1}', "[1]", "\\xff", "null"]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    with TrainingLog(tmp_path) as log:
        log.rewind(0, 5)
    assert rows(tmp_path) == [{"block": 0, "step": 1}]
