"""flow.json as records: shipped ones survive reading and writing; a malformed one is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.runs.directory import read_manifest, write_manifest
from pipeline.runs.manifest import Manifest
from pipeline.runs.passes import Pass
from pipeline.runs.zoo import zoo
from pipeline.storage import seal
from tests.pipeline.records import block_row, rewrite, synthetic_manifest

SHIPPED = sorted(path for folder in zoo().values() for path in folder.rglob("flow.json"))


def manifest() -> Manifest:
    plan = Pass("ordinary", [0.5, 0.7], False, 0.1, [1, 1], [2, 2], [0.1, 0.1])
    return synthetic_manifest("tiny", (2,)).with_passes(
        [plan.with_block(block_row(h=0.5, gamma=None, ter=0.0))]
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(path.parents[2]))
def test_shipped_manifests_survive_reading_and_writing(path: Path, tmp_path: Path) -> None:
    before = read_manifest(path.parent)
    seal.start(tmp_path)
    write_manifest(tmp_path, before)
    assert read_manifest(tmp_path).to_json() == before.to_json()
    stored, plain = json.loads(path.read_text()), before.to_json()
    assert stored["passes"][0]["blocks"][0]["sha256"] == before.blocks[0].sha256
    for key in set(stored) & set(plain) - {"passes", "init_from", "exported"}:
        assert plain[key] == stored[key], key


def test_the_stopped_pass_is_in_use_until_one_is_complete() -> None:
    unfinished = manifest()
    assert (unfinished.number, unfinished.complete) == (0, True)  # stopped by its tolerance
    first = unfinished.passes[0]
    later = Pass("refine", [0.5], False, None, [1], [2], [0.1], base=0)
    assert unfinished.with_passes([first, later]).number == 0
    done = later.with_block(block_row(h=0.5, gamma=None))
    assert unfinished.with_passes([first, done]).number == 1


def _changed(change: Any) -> dict[str, Any]:
    plain = json.loads(json.dumps(manifest().to_json()))
    change(plain)
    return plain


def test_flow_json_without_a_pass_is_an_error(tmp_path: Path) -> None:
    seal.start(tmp_path)
    rewrite(tmp_path / "flow.json", json.dumps(_changed(lambda m: m.update(passes=[]))))
    with pytest.raises(UserError, match="^passes in .*flow.json is empty; expected at least one"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.pop("data"), "data in flow.json is missing; expected a value"),
        (lambda m: m.update(name=3), "name in flow.json is 3; expected a string"),
        (lambda m: m.update({"pass": 4}), "pass in flow.json is 4; expected one of its 1 passes"),
        (lambda m: m.update({"pass": True}), "pass in flow.json is True; expected an integer"),
        (lambda m: m.update(passes={}), r"passes in flow.json is \{\}; expected a list"),
        (lambda m: m.update(format=1), "flow.json is not of format 2"),
        (
            lambda m: m["standardisation"].pop("std"),
            "standardisation.std in flow.json is missing",
        ),
        (
            lambda m: m["passes"][0]["blocks"][0].pop("sha256"),
            r"passes\[0\].blocks\[0\].sha256 in flow.json is missing",
        ),
        (
            lambda m: m["passes"][0]["blocks"][0].update(h="half"),
            r"passes\[0\].blocks\[0\].h in flow.json is 'half'; expected a number",
        ),
        (
            lambda m: m["passes"][0]["blocks"][0]["terms"].update(total=None),
            r"passes\[0\].blocks\[0\].terms.total in flow.json is None; expected a number",
        ),
        (
            lambda m: m["passes"][0]["blocks"][0]["spec"].update(magic=1),
            r"passes\[0\].blocks\[0\].spec in flow.json is not readable \(.*magic.*\); expected",
        ),
        (
            lambda m: m["autoencoder"]["adaptation"].update(fit="loose"),
            "autoencoder.adaptation in flow.json is not readable",
        ),
    ],
)
def test_a_malformed_manifest_is_one_sentence(change: Any, sentence: str) -> None:
    assert manifest().to_json() == Manifest.from_json(_changed(lambda m: None)).to_json()
    with pytest.raises(UserError, match=f"^{sentence}") as error:
        Manifest.from_json(_changed(change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("h", "stops"), [(0.05, False), (0.5, False), (1.0, True), (2.0, True)])
def test_a_short_step_may_move_samples_little(h: float, stops: bool) -> None:
    """The rule is Ter(k) < tolerance · min(1, h)²; without the factor all four would stop."""
    plan = Pass("ordinary", [h, h], False, 0.01, [1, 1], [2, 2], [0.1, 0.1])
    row = block_row(h=h, gamma=None, ter=0.005)
    assert plan.with_block(row).stopped is stops
