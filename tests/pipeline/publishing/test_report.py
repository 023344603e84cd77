"""Reports: one self-contained page with the metrics and pictures of the run."""

from __future__ import annotations

import base64
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator
from PIL import Image

from pipeline.publishing.report import previews_of
from pipeline.runs.directory import read_manifest
from pipeline.runs.movement_plot import plot_movement
from pipeline.runs.run import open_run
from pipeline.training.previews import preview_file
from pipeline.training.train import train
from tests.pipeline.drawing import plan_of
from tests.pipeline.gaussian_source import GaussianSource, quiet, tiny
from tests.pipeline.records import rewrite
from tests.pipeline.tiny import say


class Page(HTMLParser):
    """Parser of a page: rows of the tables, text and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.pre = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img"):  # which have no end
            self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.tags and self.tags[-1] == "pre":
            self.pre += data


def report(run: Path, capsys: pytest.CaptureFixture[str]) -> Page:
    code, out, _ = say(capsys, "report", "--run", run)
    assert (code, out.strip()) == (0, str(run / "report.html"))
    page = Page((run / "report.html").read_text())
    assert not page.tags  # all closed
    return page


def test_a_report_shows_the_content_of_the_run(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert say(capsys, "generate", "--run", run, "-n", "4")[0] == 0
    manifest = read_manifest(run)
    plot_movement(manifest, run / "samples" / "movement.png")
    metrics = {
        "fid": {"n": 40, "reference": "<digits>", "value": 7.125, "seed": 3, "extractor": "x&y"},
        "rfid": {"n": 40, "split": "test", "value": 3.5},
        "real_test_fid": None,
        "sampling": plan_of(open_run(run)).identity(),
        "nfe": 24,
        "train_seconds": 12.5,
        "peak_memory_bytes": 3 * 2**29,
    }
    rewrite(run / "metrics.json", json.dumps(metrics))
    page = report(run, capsys)
    known = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert known["FID(n=40, <digits>)"] == "7.12   (seed 3)"
    assert known["reconstruction floor (n=40)"] == "3.50   (test)"
    assert known["extractor"] == "x&y" and known["NFE a sample"] == "24"
    assert known["peak memory"] == "1.50 GiB" and known["seconds, training"] == "12.5"
    environment = json.loads((run / "environment.json").read_text())
    assert known["versions.torch"] == environment["versions"]["torch"]
    blocks = [row for row in page.rows if len(row) == 10][1:]
    assert [row[1] for row in blocks] == ["h = 0.5", "h = 0.75", "free"]
    for cells, row in zip(blocks, manifest.blocks, strict=True):
        assert cells[2] == f"{row.movement:.4f}" and cells[9] == f"{row.seconds:.1f}"
        assert float(cells[5]) == pytest.approx(row.terms["neg_log_det"], abs=1e-4)
        assert bool(cells[6]) == ("movement" in row.terms)
    assert yaml.safe_load(page.pre) == yaml.safe_load((run / "config.yaml").read_text())
    # nothing but the pictures is referred to, and they lie inside
    names = [run / "samples" / name for name in ("grid.png", "movement.png")]
    names += [run / preview_file(block, 6) for block in range(3)]
    pictures = [
        base64.b64decode(link.partition("data:image/png;base64,")[2]) for link in page.links
    ]
    assert pictures == [path.read_bytes() for path in names]


def test_a_run_that_was_not_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "samples", ignore_errors=True)
    shutil.rmtree(run / "previews")
    page = report(run, capsys)
    assert not page.links and not any("FID" in cell for row in page.rows for cell in row)
    assert "jkoflow evaluate" in (run / "report.html").read_text()


def test_metrics_of_other_blocks_are_not_shown(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fid = {"n": 4, "reference": "r", "value": 7.0, "seed": 0}
    metrics = {"fid": fid, "real_test_fid": None, "nfe": 24}
    for blocks, shown in ((None, True), (1, False)):
        sampling = plan_of(open_run(run, blocks)).identity()
        rewrite(run / "metrics.json", json.dumps({**metrics, "sampling": sampling}))
        page = report(run, capsys)
        assert any("FID" in cell for row in page.rows for cell in row) == shown
        assert ("These metrics are of other blocks" in (run / "report.html").read_text()) != shown


def test_a_grid_of_other_blocks_has_a_warning(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, warned in ((["--blocks", "1"], True), ([], False)):
        assert say(capsys, "generate", "--run", run, "-n", "2", *words)[0] == 0
        report(run, capsys)
        assert ("Sampled from other blocks" in (run / "report.html").read_text()) == warned


@pytest.mark.parametrize("name", ["nfe", "curve", "likelihood"])
def test_a_plot_of_other_blocks_has_a_warning(
    run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = run / "samples" / f"{name}.png"
    picture.parent.mkdir(exist_ok=True)
    Image.new("L", (2, 2)).save(picture)
    for blocks, warned in ((None, False), (1, True)):
        opened = open_run(run, blocks)
        measured = {"run": opened.fingerprint}
        if name != "likelihood":
            measured = {"sampling": plan_of(opened).identity()}
        rewrite(run / f"{name}.json", json.dumps(measured))
        report(run, capsys)
        assert ("Sampled from other blocks" in (run / "report.html").read_text()) == warned


def test_a_run_on_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A report of points has their metrics; commands on images refuse the run."""
    folder = tmp_path / "points"
    train(tiny(), folder, Accelerator(), quiet, True, GaussianSource())
    manifest = json.loads((folder / "flow.json").read_text())
    del manifest["autoencoder"]  # which that source pretends to have
    rewrite(folder / "flow.json", json.dumps(manifest))
    (folder / "samples").mkdir(exist_ok=True)
    rewrite(folder / "samples" / "metrics.json", json.dumps({"nll_per_dim": 1.25, "nfe": 9}))
    assert ["nll_per_dim", "1.25"] in report(folder, capsys).rows
    for words in (["generate"], ["evaluate"], ["likelihood"], ["export", "--out", tmp_path / "x"]):
        code, _, last = say(capsys, words[0], "--run", folder, *words[1:])
        assert code == 2 and last.startswith(f"error: the run at {folder} is on points"), last


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, last = say(capsys, "report", "--run", tmp_path)
    assert code == 2 and last.startswith(f"error: no run at {tmp_path}")


def test_of_many_previews_the_first_and_the_last_are_shown(tmp_path: Path) -> None:
    places = [(0, step, 0) for step in range(500, 10_500, 500)] + [(1, 500, 0), (0, 500, 1)]
    (tmp_path / "previews").mkdir()
    for place in places:
        (tmp_path / preview_file(*place)).touch()
    shown = [caption for caption, _ in previews_of(tmp_path)]
    assert len(shown) == 12 and shown[0] == "block 0, step 500"
    assert shown[-1] == "pass 1, block 0, step 500"
