from __future__ import annotations

import numpy as np
import pytest

from eval.distances import frechet_distance
from eval.references import load_reference, read_reference, reference_bytes, reference_names
from eval.sets.sources import stats_of
from tests.eval.moments import stats_from

CARD = {"dataset": "d", "split": "train", "n": 400, "extractor": "e", "content_sha256": "0" * 64}


@pytest.fixture
def stats():
    rng = np.random.default_rng(0)
    return stats_from(rng.normal(size=(400, 150)) * np.logspace(0, -2, 150))


def test_survives_the_file(stats, tmp_path):
    (tmp_path / "r.safetensors").write_bytes(reference_bytes(stats, {**CARD, "note": "é"}))
    actual = read_reference(tmp_path / "r.safetensors")
    assert actual.card == {**CARD, "note": "é"}
    assert actual.stats.n == 400
    assert np.array_equal(actual.stats.mean, stats.mean)
    assert np.array_equal(actual.stats.cov, actual.stats.cov.T)
    np.testing.assert_allclose(actual.stats.cov, stats.cov, rtol=1e-7)
    assert reference_bytes(stats, CARD) == reference_bytes(stats, CARD)


def test_rounding_does_not_move_fid(stats, tmp_path):
    rng = np.random.default_rng(1)
    other = stats_from(1.1 * rng.normal(size=(300, 150)) * np.logspace(0, -2, 150))
    (tmp_path / "r.safetensors").write_bytes(reference_bytes(stats, CARD))
    rounded = read_reference(tmp_path / "r.safetensors").stats
    exact = frechet_distance(stats, other)
    assert abs(frechet_distance(rounded, other) - exact) < 1e-6 * exact
    assert frechet_distance(rounded, stats) < 1e-6 * exact


def test_unknown_name_lists_the_known():
    with pytest.raises(
        ValueError, match="'cifar11' is neither a file nor shipped; expected one of"
    ) as e:
        load_reference("cifar11")
    assert all(name in str(e.value) for name in reference_names())


@pytest.mark.parametrize("name", reference_names())
def test_shipped_references_are_whole(name):
    reference = load_reference(name)
    assert reference.stats.n == reference.card["n"] > 2048
    assert name == f"{reference.card['dataset']}-{reference.card['split']}"
    assert reference.stats.dim == 2048
    values = np.linalg.eigvalsh(reference.stats.cov)
    assert values[0] > -1e-5 * values[-1]
    assert 0.1 < reference.stats.mean.mean() < 1  # pool3 features are averages of ReLUs


def test_bad_cards_and_files_raise(stats, tmp_path):
    with pytest.raises(ValueError, match="lacks split, content_sha256"):
        reference_bytes(stats, {k: CARD[k] for k in ("dataset", "n", "extractor")})
    with pytest.raises(ValueError, match="n is 399 in the card and 400 in the statistics"):
        reference_bytes(stats, {**CARD, "n": 399})
    whole = reference_bytes(stats, CARD)
    for name, content in (("cut", whole[:-10]), ("junk", b"junk"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not a complete file"):
            read_reference(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_reference(tmp_path / "absent")


def test_a_reference_can_be_loaded_from_any_file(tmp_path):
    rng = np.random.default_rng(0)
    stats = stats_from(rng.normal(size=(40, 2048)))
    path = tmp_path / "mine.safetensors"
    path.write_bytes(reference_bytes(stats, {**CARD, "n": 40}))
    assert np.array_equal(load_reference(str(path)).stats.mean, stats.mean)
    assert np.array_equal(stats_of(path, no_network).mean, stats.mean)
    small = stats_from(rng.normal(size=(40, 8)))
    path.write_bytes(reference_bytes(small, {**CARD, "n": 40}))
    with pytest.raises(ValueError, match="have 8 dimensions; expected 2048"):
        stats_of(path, no_network)
    with pytest.raises(ValueError, match="neither a file nor shipped"):
        load_reference(str(tmp_path / "other.safetensors"))


def no_network():
    raise AssertionError("statistics need no network")
