"""Experiment trackers of a training: TensorBoard, Trackio, Weights & Biases and MLflow.

accelerate's trackers write to them. A resumed training continues the same run of each tracker;
trackers.json in the run directory has its names. A tracker that fails is dropped, and the training
goes on.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.storage import atomic
from pipeline.storage.records import from_json

#: names of the trackers, each that of its extra and of its module
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
FILE = "trackers.json"
PROJECT = "jkoflow"


class Trackers:
    """Trackers of a run; without names nothing is opened.

    Args:
        names: of the trackers, see `TRACKERS`.
        folder: the run directory.
        settings: of the training, by dotted key.
        warn: prints a sentence about a tracker that is dropped.

    Raises:
        UserError: a tracker is unknown, not installed, or does not start.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        settings: Mapping[str, Any],
        warn: Callable[[str], object],
    ) -> None:
        self.warn = warn
        self._trackers: list[Any] = []
        require_trackers(names)
        if not names:
            return
        path = Path(folder) / FILE
        known: dict[str, str] = {}
        if path.is_file():
            known = from_json(dict[str, str], atomic.read_json(path, "trackers"), str(path))
        known.setdefault("id", uuid.uuid4().hex[:8])
        for name in dict.fromkeys(names):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    self._trackers.append(_start(name, Path(folder), known, settings))
            except Exception as error:
                raise UserError(
                    f"the tracker {name} does not start ({error}); set it up, or leave it out of "
                    "the setting trackers"
                ) from error
        atomic.write_json(path, known)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send scalars of a step."""
        self._each(lambda tracker: tracker.log(dict(values), step=step))

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Send a PNG file of a step."""
        self._each(lambda tracker: _log_picture(tracker, name, path, step))

    def close(self) -> None:
        """Finish the runs of all trackers."""
        self._each(lambda tracker: tracker.finish())
        self._trackers = []

    def _each(self, work: Callable[[Any], object]) -> None:
        for tracker in list(self._trackers):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    work(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                self.warn(f"warning: the tracker {tracker.name} failed and is dropped: {error}")


def require_trackers(names: Sequence[str]) -> None:
    """Check that trackers are known and installed.

    Raises:
        UserError: one is not.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(
                f"the tracker {name!r} is unknown; expected one of {', '.join(TRACKERS)}"
            )
        if find_spec(name) is None:
            raise UserError(
                f"the tracker {name} is not installed; do `pip install 'jkoflow[{name}]'`, or "
                "leave it out of the setting trackers"
            )


def _start(name: str, folder: Path, known: dict[str, str], settings: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Start a tracker of accelerate, and give it the settings; TensorBoard shows none."""
    from accelerate import tracking

    if name == "tensorboard":
        threading.excepthook = _hide_writers
        board = tracking.TensorBoardTracker(name, logging_dir=folder)
        board.start()
        return board
    title = folder.resolve().name
    if name == "trackio":
        tracker = tracking.TrackioTracker(
            PROJECT, name=f"{title}-{known['id']}", resume="allow", embed=False
        )
    elif name == "wandb":
        tracker = tracking.WandBTracker(
            PROJECT, name=title, id=known["id"], resume="allow", dir=str(folder)
        )
    else:
        tracker = tracking.MLflowTracker(PROJECT, run_id=known.get(name), run_name=title)
    tracker.start()
    if name not in known:
        tracker.store_init_configuration(dict(settings))
        known[name] = tracker.tracker.info.run_id if name == "mlflow" else known["id"]
    return tracker


def _hide_writers(error: threading.ExceptHookArgs) -> None:
    """Print the error of a thread, unless TensorBoard's writer raises it again at the next row."""
    if not type(error.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(error)


def _log_picture(tracker: Any, name: str, path: Path, step: int) -> None:  # noqa: ANN401
    """Send a PNG file to a tracker of accelerate; each takes pictures in its own form."""
    import numpy as np
    from PIL import Image

    if tracker.name == "mlflow":
        return tracker.log_artifact(str(path), name)
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    if tracker.name == "trackio":
        import trackio

        return tracker.log({name: trackio.Image(picture)}, step=step)
    if tracker.name == "wandb":
        return tracker.log_images({name: [picture]}, step=step)
    tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
