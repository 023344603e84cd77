"""Shipped runs: opened by their names, from copies in the home folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.publishing.export import _WRITTEN, export
from pipeline.runs import zoo as shipped
from pipeline.runs.directory import read_manifest
from pipeline.runs.run import open_run
from tests.pipeline.drawing import plan_of
from tests.pipeline.publishing.test_export import files
from tests.pipeline.records import rewrite
from tests.pipeline.tiny import World, say


@pytest.fixture
def zoo(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ship a run by the name of `tiny`, with an empty data root."""
    export(plan_of(open_run(run)), tmp_path / "zoo" / "tiny")
    monkeypatch.setattr(shipped, "zoo", lambda: {"tiny": tmp_path / "zoo" / "tiny"})
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "fresh"))
    return tmp_path / "zoo"


def test_a_shipped_run_generates_on_a_fresh_machine(
    zoo: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(zoo)
    code, out, _ = say(capsys, "generate", "--run", "zoo:tiny", "-n", "9")
    grid = Path(out.strip())
    assert code == 0 and grid.is_relative_to(tmp_path / "fresh" / "zoo")
    assert Image.open(grid).size[0] > 3 * 12
    assert files(zoo) == before  # package data are left as they are
    # the copy is used from now on
    shutil.rmtree(zoo / "tiny" / "blocks")
    assert say(capsys, "generate", "--run", "zoo:tiny", "-n", "4")[0] == 0
    assert len(open_run(Path("zoo:tiny")).flow) == 3


def test_a_copy_that_was_interrupted_is_finished(zoo: Path, tmp_path: Path) -> None:
    copy = shipped.locate("zoo:tiny")
    (copy / "flow.json").unlink()  # committed last
    (copy / "blocks" / "block-01.safetensors").unlink()
    assert shipped.locate(Path("zoo:tiny")) == copy
    assert len(open_run(copy).flow) == 3


def test_a_newer_version_of_a_shipped_run_is_another_copy(zoo: Path) -> None:
    """Other settings of the same blocks count, too."""
    old = shipped.locate("zoo:tiny")
    text = (zoo / "tiny" / "config.yaml").read_text()
    rewrite(zoo / "tiny" / "config.yaml", text.replace("n: 10", "n: 11"))
    new = shipped.locate("zoo:tiny")
    assert new != old and open_run(new).config.generate.n == 11
    rewrite(zoo / "tiny" / "metrics.json", '{"fid": {"value": 12.5}}')
    newest = shipped.locate("zoo:tiny")
    assert newest != new and "12.5" in (newest / "metrics.json").read_text()


def test_the_manifest_of_a_copy_is_written_last(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest of the run comes last, after that of its guide."""
    shutil.copytree(zoo / "tiny", zoo / "tiny" / "guide")
    written: list[Path] = []
    monkeypatch.setattr(shipped.atomic, "write_bytes", lambda path, _: written.append(path))
    copy = shipped.locate("zoo:tiny")
    assert written[-1] == copy / "flow.json" and copy / "guide" / "flow.json" in written


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--class", "3"),
        ("generate", "--blocks", "99"),
        ("generate", "--guidance", "2", "--guide", "zoo:other"),
        ("edit", "--to", "3"),
        ("evaluate", "--curve"),
        ("likelihood", "--blocks", "99"),
    ],
    ids=" ".join,
)
def test_errors_name_a_shipped_run_as_it_was_given(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    command, *options = words
    code, _, error = say(capsys, command, "--run", "zoo:tiny", *options)
    assert code == 2 and "the run at zoo:tiny" in error, error
    assert str(tmp_path / "fresh") not in error


def test_the_name_of_a_run_is_how_it_was_given(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot of the hub stands for a download."""
    shutil.copytree(zoo / "tiny", tmp_path / "0123456789abcdef")
    shutil.copytree(zoo / "tiny", zoo / "tiny" / "guide")
    monkeypatch.setattr(shipped.hub, "download", lambda *_: tmp_path / "0123456789abcdef")
    for name in ("zoo:tiny", "zoo:tiny/guide", "hf://me/my-digits", str(tmp_path / "run")):
        assert shipped.name_of(shipped.locate(name)) == name
    own = tmp_path / "fresh" / "zoo" / "own"  # no copy, for it has no hash
    assert shipped.name_of(own) == str(own)


def test_init_from_takes_a_shipped_run(
    zoo: Path, trained: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("JKOFLOW_HOME", str(trained.home))
    words = ("train", "-c", trained.config(), "-r", tmp_path / "new", "--init-from", "zoo:tiny")
    assert say(capsys, *words, "--set", "train.iterations=1")[0] == 0
    kept = read_manifest(tmp_path / "new").init_from
    shipped_rows = read_manifest(zoo / "tiny").blocks
    assert kept.run == "zoo:tiny"
    assert [row.sha256 for row in kept.blocks] == [row.sha256 for row in shipped_rows]
    shutil.rmtree(trained.home / "zoo")
    # exported, a run has no path of this machine, wherever it came from
    words = ("train", "-c", trained.config(), "-r", tmp_path / "more", "--init-from", zoo / "tiny")
    assert say(capsys, *words, "--set", "train.iterations=1")[0] == 0
    out = export(plan_of(open_run(tmp_path / "more")), tmp_path / "shipped").folder
    for path in (out / "flow.json", out / "config.yaml", out / "CARD.md"):
        assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize("verb", ["generate", "evaluate", "likelihood"])
def test_an_unknown_shipped_name_is_refused(
    zoo: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = say(capsys, verb, "--run", "zoo:nothing")
    assert code == 2
    assert error.startswith("error: unknown shipped run 'zoo:nothing'; choose one of tiny, or")


def test_the_guide_inside_a_shipped_run_is_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path))
    guide = open_run(Path("zoo:mnist-fine/guide"))
    assert guide.folder.parent == open_run(Path("zoo:mnist-fine")).folder
    assert guide.flow.specs[0].velocity.width == 32
    with pytest.raises(UserError, match="zoo:mnist-fine/refiner is no run; choose one of zoo:"):
        open_run(Path("zoo:mnist-fine/refiner"))


def test_a_missing_autoencoder_is_refused(
    zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (zoo / "tiny" / "autoencoder.safetensors").unlink()
    code, _, error = say(capsys, "generate", "--run", "zoo:tiny", "-n", "4")
    assert code == 2 and error.count(". ") == 0
    assert error.startswith("error: the autoencoder of the run at ") and "not available" in error


def test_everything_shipped_opens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All shipped runs are complete and small, with a card and their autoencoder."""
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path))
    total = 0
    for name, folder in shipped.zoo().items():
        opened = open_run(Path(f"zoo:{name}"))
        assert opened.autoencoder().latent_shape == opened.flow.shape
        plan = plan_of(opened)  # its guide and refiner fit
        refiner = opened.config.generate.refiner
        inside = refiner is not None and not refiner.startswith("zoo:")
        assert inside == (folder / "refiner").is_dir() and (plan.refiner is None) == (not refiner)
        size = sum((folder / file).stat().st_size for file in files(folder))
        assert size < 25e6
        total += size
        strange = [f for f in files(folder) - {"flow.json"} if not _WRITTEN.fullmatch(f)]
        assert not strange, "no export writes that, such as images drawn from the folder itself"
        assert "to be written" not in (folder / "CARD.md").read_text()
    assert 10e6 < total < 60e6  # of the repository, whose clones all carry it
