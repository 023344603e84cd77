"""The readers that open a file of a kind."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.strangers.pictures import png


def readers_of(kind: str, path: Path) -> Iterator[Callable[[], object]]:
    """The readers that open a file of a kind."""
    from eval.sets.images import FolderImages
    from eval.sets.sources import open_source
    from pipeline.assets.archives import find_files, read_bytes
    from pipeline.config.data import DataConfig
    from pipeline.data.datasets import load_images
    from pipeline.data.image_folder import read_pictures
    from pipeline.data.imagenet32 import read_batch
    from pipeline.integrity.checkpoints import read_checkpoint
    from pipeline.integrity.safe_pickle import load_batch
    from pipeline.toy2d.picture_densities import PictureDensity

    def images(name: str, place: Path) -> None:
        data = load_images(DataConfig(name=name, path=str(place), size=8))
        data.read(0, min(len(data), 100))

    def source() -> None:
        opened = open_source(path)
        if opened.images is not None:
            for _ in zip(range(3), opened.images.batches(), strict=False):
                pass

    def opened() -> None:
        from autoencoders.weights import load_weights

        load_weights(path)

    if kind == "pickle":
        from eval.features.inception_weights import read_weights

        statistics, zipped = path.with_name("x.pkl"), path.with_name("x.ckpt")
        statistics.write_bytes(path.read_bytes())
        with zipfile.ZipFile(zipped, "w") as archive:
            for name, data in {
                "x/data.pkl": path.read_bytes(),
                "x/version": b"3\n",
                "x/byteorder": b"little",
                "x/data/0": bytes(64),
            }.items():
                archive.writestr(name, data)
        yield lambda: load_batch(path)
        yield lambda: read_batch(path)
        yield lambda: read_checkpoint(path)
        yield lambda: read_checkpoint(zipped)
        yield lambda: read_weights(zipped)
        yield lambda: open_source(statistics)
    elif kind == "picture":
        (path.parent / "other.png").write_bytes(png(8, 8))
        yield lambda: list(FolderImages(path.parent).batches())
        yield lambda: images("folder", path.parent)
        yield lambda: read_pictures([path], (3, 8, 8))
        yield lambda: PictureDensity.from_file(path)
    else:
        scratch = path.parent / "scratch"
        scratch.mkdir(exist_ok=True)
        yield source
        yield lambda: find_files(
            path, ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"], scratch
        )
        if path.suffix == ".gz":
            yield lambda: read_bytes(path)
        elif path.suffix == ".npz":
            yield lambda: images("npz", path)
            yield lambda: read_batch(path)
        elif path.suffix == ".tar":
            yield lambda: images("webdataset", path)
        elif path.suffix in (".parquet", ".arrow"):
            yield lambda: images("hf", path)
        elif path.suffix == ".safetensors":
            yield opened
            yield lambda: read_checkpoint(path)
