"""Several data sets as one."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.config.data import DataConfig
from pipeline.data.datasets import load_images
from pipeline.data.image_set import ArrayPixels, ImageSet, join
from pipeline.errors import UserError
from pipeline.evaluation.real_images import at_least


def made(count: int, first: int, shape: tuple[int, int, int] = (1, 2, 2)) -> ImageSet:
    images = np.full((count, *shape), first, np.uint8)
    images += np.arange(count, dtype=np.uint8)[:, None, None, None]
    labels = np.zeros(count, np.int64)
    return ImageSet(f"set{first}", "train", shape, str(first), count, ArrayPixels(images, labels))


def test_images_of_joined_sets_are_concatenated():
    joined = join([made(3, 0), made(4, 100), made(2, 200)])
    assert len(joined) == 9 and joined.name == "set0+set100+set200"
    values = [0, 1, 2, 100, 101, 102, 103, 200, 201]
    assert joined.read(0, 9)[:, 0, 0, 0].tolist() == values
    order = np.array([8, 0, 3, 3, 6, 2])
    assert joined.take(order)[:, 0, 0, 0].tolist() == [values[i] for i in order]
    assert joined.take(np.array([4]))[:, 0, 0, 0].tolist() == [101]


def test_joined_sets_have_no_classes():
    assert join([made(3, 0), made(4, 100)]).labels is None
    alone = join([made(3, 0)])
    assert alone.labels is not None and alone.name == "set0"


def test_the_fingerprint_depends_on_sets_and_order():
    a, b = made(3, 0), made(4, 100)
    assert len({join(p).fingerprint for p in ([a, b], [b, a], [a], [a, a])}) == 4


def test_joined_sets_need_one_shape():
    with pytest.raises(UserError, match=r"data.also: images of set100 .*sets of one shape"):
        join([made(3, 0), made(4, 100, (3, 2, 2))])


def test_configuration_joins_splits_and_limits_each():
    data = DataConfig(name="mnist", limit=5, also=["mnist/test"])
    joined = load_images(data)
    parts = [load_images(DataConfig(name="mnist", split=s, limit=5)) for s in ("train", "test")]
    assert np.array_equal(joined.read(0, 10), np.concatenate([p.read(0, 5) for p in parts]))
    assert joined.split == "train+test"


def test_evaluation_uses_the_first_set_alone():
    data = DataConfig(name="mnist", also=["mnist/train"])
    assert load_images(data.of_split("test")).fingerprint == (
        load_images(DataConfig(name="mnist", split="test")).fingerprint
    )
    alone = load_images(DataConfig(name="mnist")).fingerprint
    assert at_least(data, 20_000).fingerprint == alone  # more than the test split has


@pytest.mark.parametrize(
    ("also", "message"),
    [("cifra10", "data set 'cifra10' is unknown"), ("mnist/val", "mnist has no split 'val'")],
)
def test_an_unknown_name_is_a_user_error(also, message):
    with pytest.raises(UserError, match=message):
        load_images(DataConfig(name="mnist", also=[also]))
