"""Comparison of runs: one page with the values of every run, readable on any screen."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.publishing.comparison import _Run
from pipeline.runs.directory import read_manifest
from pipeline.runs.run import open_run
from tests.pipeline.drawing import plan_of
from tests.pipeline.gaussian_source import tiny
from tests.pipeline.publishing.test_report import Page
from tests.pipeline.records import rewrite, synthetic_manifest
from tests.pipeline.tiny import World, run_child, say

#: words of the tables that stand on several lines
_BROKEN_WORDS = """() => {
    const broken = [], range = document.createRange();
    for (const cell of document.querySelectorAll("td, th")) {
        const text = cell.firstChild;
        for (const word of (text ? text.data : "").matchAll(/[^\\s-]+/g)) {
            range.setStart(text, word.index);
            range.setEnd(text, word.index + word[0].length);
            if (range.getClientRects().length > 1) broken.push(word[0]);
        }
    }
    return broken;
}"""


@pytest.fixture(scope="module")
def other(trained_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with another learning rate and several previews."""
    run = tmp_path_factory.mktemp("other") / "other"
    config = trained_world.config("other", train={"lr": 5e-3, "preview_every": 2})
    run_child("train", "--config", config, "--run", run, env=trained_world.environment)
    return run


def compare(capsys: Any, out: Path, *runs: Path) -> str:
    code, printed, _ = say(capsys, "report", *runs, "--out", out)
    assert (code, printed.strip()) == (0, str(out))
    return out.read_text()


def test_a_comparison_shows_all_runs(
    run: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert say(capsys, "generate", "--run", run, "-n", "4")[0] == 0
    metrics = {
        "fid": {"n": 40, "reference": "digits", "value": 7.125, "seed": 3, "extractor": "x"},
        "real_test_fid": None, "sampling": plan_of(open_run(run)).identity(), "nfe": 24,
    }  # fmt: skip
    rewrite(run / "metrics.json", json.dumps(metrics))
    text = compare(capsys, tmp_path / "page.html", run, other)
    page = Page(text)
    assert not page.tags
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["FID(n=40, digits)"][0].startswith("7.12") and rows["FID(n=40, digits)"][1] == "–"
    assert rows["train.lr"] == ["0.001", "0.005"] and rows["train.preview_every"] == ["500", "2"]
    assert "velocity.width" not in rows
    blocks = [read_manifest(folder).blocks for folder in (run, other)]
    assert rows["iterations"] == [str(sum(row.iterations for row in each)) for each in blocks]
    assert len(page.links) == 1 + 3 + 9  # a grid, and the previews of both runs


def test_runs_without_samples(
    run: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = compare(capsys, tmp_path / "page.html", run, other)
    assert "No samples yet; run <code>jkoflow generate</code>." in text


def test_curves_of_losses(
    run: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A point for each row of the log, from left to right; higher losses are higher up."""
    text = compare(capsys, tmp_path / "page.html", run, other)
    lines = re.findall(r'<polyline points="([^"]*)"', text)
    assert len(lines) == 2
    for folder, line in zip((run, other), lines, strict=True):
        rows = [json.loads(row) for row in (folder / "log.jsonl").read_text().splitlines()]
        losses = [row["total"] for row in rows if "total" in row]
        x, y = np.array([[float(part) for part in point.split(",")] for point in line.split()]).T
        assert len(x) == len(losses) and (np.diff(x) > 0).all()
        inside = np.argsort(losses)[1:-1]
        assert (np.diff(y[inside]) <= 0.11).all()


def test_a_comparison_on_a_phone_in_dark_and_light(
    browser: Any, run: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(capsys, tmp_path / "page.html", run, other)
    for scheme, dark in (("dark", True), ("light", False)):
        page = browser.new_page(viewport={"width": 375, "height": 700}, color_scheme=scheme)
        page.goto((tmp_path / "page.html").as_uri())
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 375
        assert page.evaluate(_BROKEN_WORDS) == []
        with Image.open(io.BytesIO(page.screenshot())) as opened:
            pixels = np.asarray(opened.convert("L"))
        assert (pixels[:, :5].mean() < 80) == dark
        assert (pixels.max() > 200) if dark else (pixels.min() < 60)  # the text can be read
        page.close()


@pytest.mark.parametrize("runs", [("a",), ("a", "a"), tuple("abcdefghi")])
def test_one_run_or_too_many(runs: tuple[str, ...], tmp_path: Path, capsys: Any) -> None:
    code, _, line = say(capsys, "report", *runs, "--out", tmp_path / "page.html")
    assert code == 2 and f"is {len(set(runs))}; expected two to 8; name each once" in line
    assert "--run" in line


def test_neither_a_run_nor_runs(capsys: Any) -> None:
    code, _, line = say(capsys, "report")
    assert code == 2 and line.startswith("error: report takes either --run")


def test_losses_of_passes_follow_each_other(tmp_path: Path) -> None:
    places = [(0, 0, 5), (0, 0, 10), (0, 1, 5), (1, 0, 5), (2, 0, 5), (2, 0, 10)]
    rows = [{"pass": p, "block": b, "step": s, "total": 1.0} for p, b, s in places]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = _Run("run", tmp_path, tiny(), synthetic_manifest("run", (2,)), {})
    assert [step for step, _ in run.losses] == [5, 10, 15, 20, 25, 30]


def test_metrics_of_other_blocks_are_left_out(
    run: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = {"fid": {"n": 4, "reference": "r", "value": 7.0, "seed": 0}, "real_test_fid": None,
               "nfe": 24}  # fmt: skip
    for blocks, shown in ((None, True), (1, False)):
        sampling = plan_of(open_run(run, blocks)).identity()
        rewrite(run / "metrics.json", json.dumps({**metrics, "sampling": sampling}))
        text = compare(capsys, tmp_path / "page.html", run, other)
        assert ("FID(n=4, r)" in text) == shown
