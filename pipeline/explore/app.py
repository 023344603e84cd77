"""Page of the explorer, made with gradio; an event carries all settings, so users share none."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.pictures import image_grid, save_png
from flows.errors import SolveError
from pipeline.errors import JkoflowError, UserError
from pipeline.explore.explorer import Choice, Explorer
from pipeline.storage import atomic

_ANY, _UNKNOWN = "as in the data", "unknown"
#: value of these two; a class may be called unknown, but no folder has this name
NO_CLASS = "/"
#: pictures leave room above for their labels and buttons
_STYLE = """
#samples, #inverted, #noise, #edited { padding-top: 2em }
#samples, #inverted, #noise, #edited { .icon-button-wrapper { transform: translateY(-2em) } }
"""
_BUTTONS = ["fullscreen", "download"]
#: side in pixels that pictures of one image are enlarged to, about
_SIDE = 224
_MOST_GUIDANCE = 8.0
_MOST_STEPS = 32


@dataclass(frozen=True)
class Address:
    """Address of the page; the host is a name or number of this machine."""

    host: str
    port: int

    def require_free(self) -> None:
        """Check that the port can be opened.

        Raises:
            UserError: it is in use, or the host is not this machine.
        """
        try:
            infos = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, place = infos[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"port {self.port} of {self.host} cannot be opened ({error}); choose another one "
                "with --port"
            ) from error


def import_gradio() -> Any:  # noqa: ANN401 - an optional package
    """Import gradio, which then sends no statistics.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        with _without_stubs():
            import gradio
    except ImportError as error:
        raise UserError(
            "gradio is not installed; the explorer needs it; do `pip install 'jkoflow[explore]'`"
        ) from error
    return gradio


@contextlib.contextmanager
def _without_stubs() -> Iterator[None]:
    """Keep gradio from its stub files for editors, which take half of the time of its import.

    It writes them for classes with a source file.
    """
    original = inspect.getfile

    def getfile(thing: Any) -> str:  # noqa: ANN401 - as in inspect
        if isinstance(thing, type) and thing.__module__.startswith("gradio."):
            raise OSError("no source file is needed")
        return original(thing)

    inspect.getfile = getfile  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getfile = original


def serve(explorer: Explorer, address: Address) -> tuple[Any, str]:
    """Open the page in the background; return the app, which has `close()`, and its URL.

    Raises:
        UserError: gradio is not installed, or the port is in use.
    """
    gradio = import_gradio()
    address.require_free()
    app = build(explorer)
    fonts = ["system-ui", "sans-serif"]
    _, url, _ = app.queue(default_concurrency_limit=1).launch(
        server_name=address.host,
        server_port=address.port,
        theme=gradio.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=_STYLE,
        footer_links=[],
        ssr_mode=False,
        prevent_thread_lock=True,
        quiet=True,
    )
    return app, url


def build(explorer: Explorer) -> Any:  # noqa: ANN401 - an optional package
    """Build the page of a run."""
    gradio = import_gradio()
    page = _Page(explorer, gradio)
    run, count = explorer.run, len(explorer.run.flow)
    with gradio.Blocks(title=f"jkoflow: {run.config.name}", delete_cache=(600, 3600)) as app:
        blocks = f"{count} block" + "s" * (count > 1)
        gradio.Markdown(f"# {run.config.name}\n{run.config.train.objective}, {blocks}")
        _build_samples(gradio, page, app)
        _build_image(gradio, page)
    return app


def _build_samples(gradio: Any, page: _Page, app: Any) -> None:  # noqa: ANN401
    """Build the tab of the samples, which also shows the first ones when the page is loaded."""
    explorer = page.explorer
    count, names = len(explorer.run.flow), explorer.classes
    guidance = explorer.run.config.generate.guidance
    weight = 1.0 if guidance is None else guidance
    with gradio.Tab("Samples"), gradio.Row():
        with gradio.Column(scale=1):
            controls = [
                gradio.Dropdown(
                    [(_ANY, NO_CLASS), *names], value=NO_CLASS, label="Class",
                    visible=bool(names),
                ),
                gradio.Slider(
                    0, max(_MOST_GUIDANCE, weight), weight, step=0.25, label="Guidance",
                    visible=explorer.can_guide,
                ),
                gradio.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed"),
                gradio.Number(1, label="Second seed", precision=0, minimum=0),
                gradio.Slider(
                    0, 1, 0, step=0.05, label="From seed to second seed", elem_id="mix"
                ),
                gradio.Slider(
                    1, max(_MOST_STEPS, explorer.steps or 1), explorer.steps or 1, step=1,
                    label="Solver steps per block", visible=explorer.steps is not None,
                ),
                gradio.Slider(
                    1, max(count, 2), count, step=1, label="First blocks used",
                    visible=count > 1,
                ),
                gradio.Slider(
                    0, count, count, step=1, label="Along the blocks, from noise to images",
                    elem_id="passed",
                ),
            ]  # fmt: skip
            button = gradio.Button("New seed", elem_id="new-seed")
        with gradio.Column(scale=2):
            picture = gradio.Image(
                label="Samples", format="png", interactive=False, buttons=_BUTTONS,
                elem_id="samples",
            )  # fmt: skip
            with gradio.Row():
                png = gradio.DownloadButton("PNG", elem_id="png")
                npz = gradio.DownloadButton("NPZ", elem_id="npz")
    outputs = [picture, png, npz]
    gradio.on(
        [control.change for control in controls],
        page.sample, controls, outputs, trigger_mode="always_last", show_progress="minimal",
    )  # fmt: skip
    button.click(page.new_seed, controls[2], controls[2])
    app.load(page.sample, controls, outputs)


def _build_image(gradio: Any, page: _Page) -> None:  # noqa: ANN401
    """Build the tab of an image of the user."""
    names = page.explorer.classes
    with gradio.Tab("Your image"), gradio.Row():
        with gradio.Column(scale=1):
            file = gradio.File(label="Image", elem_id="drop", height=160)
            label = gradio.Dropdown(
                [(_UNKNOWN, NO_CLASS), *names], value=NO_CLASS, label="Class of the image",
                visible=bool(names), elem_id="label",
            )  # fmt: skip
            text = gradio.Markdown(elem_id="text")
        with gradio.Column(scale=2):
            pictures = [
                gradio.Image(
                    label=title, format="png", interactive=False, buttons=_BUTTONS,
                    elem_id=name,
                )  # fmt: skip
                for title, name in (
                    ("Image, reconstruction, image of its noise", "inverted"),
                    ("Its noise, one tile per channel", "noise"),
                )
            ]
            with gradio.Row(visible=bool(names)):
                first = names[0] if names else None
                target = gradio.Dropdown(names, value=first, label="Turn into")
                strength = gradio.Slider(0.05, 1, 0.6, step=0.05, label="Strength")
                edit = gradio.Button("Edit", elem_id="edit")
            edited = gradio.Image(
                label="The image as another class", format="png", interactive=False,
                visible=bool(names), buttons=_BUTTONS, elem_id="edited",
            )  # fmt: skip
    edit.click(page.edit, [file, label, target, strength], edited, show_progress="minimal")
    image, shown = [file, label], [*pictures, text]
    for changed in (file.upload, label.input):
        inverted = changed(page.invert, image, shown, show_progress="minimal")
        inverted.success(page.likelihood, [*image, text], text, show_progress="minimal")


class _Page:
    """Handlers of the events; each turns an error into a sentence on the page."""

    def __init__(self, explorer: Explorer, gradio: Any) -> None:  # noqa: ANN401
        self.explorer, self.gradio = explorer, gradio
        self._folder = tempfile.TemporaryDirectory(prefix="jkoflow-explore-")
        atomic.discard_at_signal(Path(self._folder.name))

    def sample(self, *values: Any) -> tuple[Any, str, str]:  # noqa: ANN401
        """Sample a grid, and write its files."""
        images = self._guard(lambda: self.explorer.sample(self._choice(*values)))
        grid = image_grid(images, 4, scale=_scale(images))
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        atomic.write_with(folder / "samples.png", lambda file: save_png(grid, file))
        buffer = io.BytesIO()
        np.savez_compressed(buffer, arr_0=images.permute(0, 2, 3, 1).numpy())
        atomic.write_bytes(folder / "samples.npz", buffer.getvalue())
        return grid, str(folder / "samples.png"), str(folder / "samples.npz")

    def new_seed(self, seed: float | None) -> int:
        """Return the seed of the next grid."""
        return int(seed or 0) + 1

    def invert(self, path: str | None, label: str) -> tuple[Any, Any, str]:
        """Show an image file, its reconstruction and its noise."""
        if path is None:
            return None, None, ""
        explorer, number = self.explorer, self._label(label)
        result = self._guard(lambda: explorer.invert(explorer.read(Path(path)), number))
        shown = torch.stack([result.image, result.reconstruction, result.from_noise])
        noise = result.noise[None]
        return (
            image_grid(shown, 3, scale=_scale(shown)),
            image_grid(noise, 1, scale=_scale(noise)),
            result.text,
        )

    def edit(self, path: str | None, label: str, target: str, strength: float) -> Any:  # noqa: ANN401
        """Show an image file as another class."""
        if path is None:
            raise self.gradio.Error("no image is given; drop one first", print_exception=False)
        explorer = self.explorer
        goal, number = explorer.classes.index(target), self._label(label)
        result = self._guard(
            lambda: explorer.edit(explorer.read(Path(path)), goal, strength, number)
        )
        return image_grid(result, 1, scale=_scale(result))

    def likelihood(self, path: str | None, label: str, text: str) -> str:
        """Add the likelihood of an image file to a text."""
        if path is None:
            return text
        explorer, number = self.explorer, self._label(label)
        added: str = self._guard(lambda: explorer.likelihood(explorer.read(Path(path)), number))
        return f"{text.rstrip()}\n{added}"  # the page returns the text without its last line end

    def _label(self, name: str) -> int | None:
        return None if name == NO_CLASS else self.explorer.classes.index(name)

    def _choice(
        self,
        label: str,
        guidance: float,
        seed: float | None,
        other: float | None,
        mix: float,
        steps: float,
        blocks: float,
        passed: float,
    ) -> Choice:
        explorer = self.explorer
        return Choice(
            label=self._label(label),
            guidance=float(guidance),
            seed=int(seed or 0),
            other=int(other or 0),
            mix=float(mix),
            steps=None if int(steps) == explorer.steps else int(steps),
            blocks=0 if int(blocks) == len(explorer.run.flow) else int(blocks),
            passed=int(passed),
        )

    def _guard(self, work: Any) -> Any:  # noqa: ANN401
        """Return a result, or show the sentence of an error and keep the page."""
        try:
            return work()
        except (JkoflowError, SolveError, ValueError) as error:
            raise self.gradio.Error(str(error), print_exception=False) from error


def _scale(images: Tensor) -> int:
    """Return the factor that enlarges images to about `_SIDE` pixels, at most by 8."""
    return max(1, min(8, _SIDE // images.shape[-2]))
