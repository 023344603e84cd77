"""Feature networks of the user: a TorchScript file, or a folder of timm or open_clip.

timm and open_clip are optional (`pip install 'jkoflow[metrics]'`), imported for such a folder.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from eval.features.inception import require_pictures
from pipeline.integrity.digests import sha256_file
from pipeline.integrity.reason import reason_of

_BATCH = 32


class FeatureNetwork(Protocol):
    """Network that maps images to features; `name` identifies the features."""

    @property
    def name(self) -> str:
        """Name of the features."""
        ...

    def features(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Compute features, float32 (B, d), of images uint8 (B, C, H, W), or of a sequence."""
        ...


class LocalNetwork:
    """Feature network from local files.

    Args:
        name: of the features.
        apply: maps one or more prepared images to features (B, d).
        prepare: maps images uint8 (B, 3, H, W) of one size to the input of `apply`.
    """

    def __init__(
        self,
        name: str,
        apply: Callable[[Tensor], Tensor],
        prepare: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        self.name, self._apply, self._prepare, self._device = name, apply, prepare, device

    @torch.inference_mode()
    def features(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Compute features, float32 (B, d), of images uint8 (B, C, H, W), C = 1 or 3.

        Raises:
            ValueError: the images have another dtype or shape, or the network returns no vectors.
        """
        parts = [images] if isinstance(images, Tensor) else [image[None] for image in images]
        rows = []
        for part in parts:
            require_pictures(part)
            for chunk in part.expand(-1, 3, -1, -1).split(_BATCH):
                features = self._apply(self._prepare(chunk).to(self._device))
                if not isinstance(features, Tensor) or features.ndim != 2 or (
                    len(features) != len(chunk)
                ):
                    shape = getattr(features, "shape", type(features).__name__)
                    raise ValueError(
                        f"the features of {self.name} are {shape} for {len(chunk)} images; "
                        "expected (B, d)"
                    )
                rows.append(features.float().cpu())
        return torch.cat(rows)


def load_network(path: str | Path, device: torch.device) -> LocalNetwork:
    """Load a feature network from local files.

    A file is TorchScript: it maps images uint8 (B, 3, H, W) to features (B, d), and is a program,
    so it has to be trusted. A folder has `config.json` and `model.safetensors` (timm), or
    `open_clip_config.json` and `open_clip_model.safetensors`; it brings its own resize.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: it is no such file or folder, or the library is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no feature network at {path}; expected inception, a TorchScript file, or a folder "
            "of timm or open_clip"
        )
    if path.is_file():
        return _torchscript(path, device)
    for config, weights, load in (
        ("open_clip_config.json", "open_clip_model.safetensors", _open_clip),
        ("config.json", "model.safetensors", _timm),
    ):
        if (path / config).is_file() and (path / weights).is_file():
            return load(path, path / weights, device)
    raise ValueError(
        f"{path} is no feature network; expected config.json and model.safetensors (timm), or "
        "open_clip_config.json and open_clip_model.safetensors"
    )


def _torchscript(path: Path, device: torch.device) -> LocalNetwork:
    """Load a TorchScript file."""
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is not TorchScript; expected a file of torch.jit.save, or a folder"
        ) from error
    return LocalNetwork(_name(path, path), network, lambda images: images, device)


def _timm(path: Path, weights: Path, device: torch.device) -> LocalNetwork:
    """Load a folder of timm, without its classifier."""
    timm = _library("timm")
    try:
        network = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise _unreadable(path, error) from error
    return LocalNetwork(
        _name(path, weights), network.to(device).eval(), _by_pillow(transform), device
    )


def _open_clip(path: Path, weights: Path, device: torch.device) -> LocalNetwork:
    """Load a folder of open_clip; the features are those of its image encoder."""
    open_clip = _library("open_clip")
    try:
        network, transform = open_clip.create_model_from_pretrained(f"local-dir:{path}")
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise _unreadable(path, error) from error
    network = network.to(device).eval()
    return LocalNetwork(
        _name(path, weights), network.encode_image, _by_pillow(transform), device
    )


def _by_pillow(transform: Callable[[Image.Image], Tensor]) -> Callable[[Tensor], Tensor]:
    """Apply a transform of pictures to every image of a batch."""
    return lambda images: torch.stack([
        transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images.cpu()
    ])  # fmt: skip


def _name(path: Path, weights: Path) -> str:
    """Return the name of a network's features: that of its path, and the hash of its weights."""
    return f"{path.name}@{sha256_file(weights)[:16]}"


def _library(name: str) -> Any:  # noqa: ANN401 - an untyped library
    """Import an optional library; a ValueError says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"the {name} library is not installed; expected it for this feature network; run: "
            "pip install 'jkoflow[metrics]'"
        ) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    """Describe a folder that a library cannot load."""
    reason = reason_of(error)
    return ValueError(f"{path} cannot be loaded ({reason}); expected a complete model")
