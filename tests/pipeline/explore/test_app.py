"""The explorer's page in headless Chromium: clicks change pictures, errors are sentences."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.explore import app
from pipeline.explore.app import Address
from pipeline.explore.explorer import Explorer, InvertedImage
from pipeline.runs.run import open_run
from tests.pipeline.tiny import World, pictures, say

SECONDS = 60_000  # milliseconds until a click must have shown its effect


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def url(browser: Any, trained_world: World) -> Iterator[str]:
    pytest.importorskip("gradio", reason="needs gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JKOFLOW_HOME", str(trained_world.home))
        explorer = Explorer(open_run(trained_world.root / "run"), torch.device("cpu"))
        served, url = app.serve(explorer, Address("127.0.0.1", free_port()))
        yield url
        served.close()


def shown(page: Any, name: str, other_than: str | None = None) -> tuple[str, np.ndarray]:
    """Wait until an element shows another picture; return its address and its pixels."""
    page.wait_for_function(
        """([name, old]) => {
            const image = document.querySelector(`#${name} img`);
            return image && image.complete && image.naturalWidth > 0 && image.src !== old;
        }""",
        arg=[name, other_than],
        timeout=SECONDS,
    )
    address = page.get_attribute(f"#{name} img", "src")
    with Image.open(io.BytesIO(page.request.get(address).body())) as picture:
        return address, np.asarray(picture.convert("L"))


def opened(browser: Any, url: str) -> Any:
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    page.goto(url)
    return page


def test_a_new_seed_changes_the_picture(browser: Any, url: str) -> None:
    page = opened(browser, url)
    before = shown(page, "samples")
    page.click("#new-seed")
    after = shown(page, "samples", before[0])
    assert before[1].std() > 5 and after[1].std() > 5
    assert not np.array_equal(before[1], after[1])
    page.close()


def test_sliders_change_the_picture(browser: Any, url: str) -> None:
    page = opened(browser, url)
    address, pixels = shown(page, "samples")
    for name, value in (("mix", "0.5"), ("passed", "0")):
        page.fill(f"#{name} input[type=number]", value)
        page.press(f"#{name} input[type=number]", "Tab")
        address, other = shown(page, "samples", address)
        assert other.std() > 5 and not np.array_equal(pixels, other)
        pixels = other
    page.close()


def test_two_users_have_their_own_settings(browser: Any, url: str) -> None:
    one, two = opened(browser, url), opened(browser, url)
    start = shown(one, "samples"), shown(two, "samples")
    assert np.array_equal(start[0][1], start[1][1])
    for page in (one, two):  # both click before either picture is there
        page.click("#new-seed")
    first = shown(one, "samples", start[0][0])
    second = shown(two, "samples", start[1][0])
    assert np.array_equal(first[1], second[1])  # the same seed, each from its own page
    two.click("#new-seed")
    second = shown(two, "samples", second[0])
    assert not np.array_equal(first[1], second[1])
    assert one.input_value("#seed input") == "1" and two.input_value("#seed input") == "2"
    one.close()
    two.close()


def test_downloads(browser: Any, url: str, tmp_path: Path) -> None:
    page = opened(browser, url)
    _, pixels = shown(page, "samples")
    for name in ("png", "npz"):
        with page.expect_download(timeout=SECONDS) as download:
            page.click(f"#{name}")
        download.value.save_as(tmp_path / f"samples.{name}")
    with Image.open(tmp_path / "samples.png") as picture:
        assert np.array_equal(np.asarray(picture), pixels)
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (4, 12, 12, 1)
    page.close()


def test_an_image_and_a_file_that_is_none(browser: Any, url: str, tmp_path: Path) -> None:
    page = opened(browser, url)
    shown(page, "samples")
    page.get_by_role("tab", name="Your image").click()
    (tmp_path / "notes.txt").write_text("no image")
    page.set_input_files("#drop input[type=file]", tmp_path / "notes.txt")
    page.get_by_text("notes.txt is no image that can be read").first.wait_for(timeout=SECONDS)
    page.reload()  # the page goes on
    page.get_by_role("tab", name="Your image").click()
    Image.fromarray(pictures(1, 5)[0]).save(tmp_path / "image.png")
    page.set_input_files("#drop input[type=file]", tmp_path / "image.png")
    assert shown(page, "inverted")[1].std() > 5 and shown(page, "noise")[1].std() > 5
    page.get_by_text("log p(z) =").wait_for(timeout=SECONDS)
    facts = page.locator("#text li").all_inner_texts()
    assert [fact.split()[0] for fact in facts] == ["‖noise‖", "inversion", "log", "its"]
    page.close()


def test_labels_cover_no_picture(browser: Any, url: str) -> None:
    page = opened(browser, url)
    shown(page, "samples")
    boxes = [
        page.locator(f"#samples {part}").bounding_box()
        for part in ("label", ".icon-button-wrapper", "img")
    ]
    *above, image = boxes
    assert all(box["height"] > 0 and box["y"] + box["height"] <= image["y"] + 1 for box in above)
    page.close()


def test_a_class_may_be_called_unknown(trained: World, monkeypatch: pytest.MonkeyPatch) -> None:
    gradio = pytest.importorskip("gradio", reason="needs gradio")
    monkeypatch.setattr(Explorer, "classes", ["cat", "unknown"])
    explorer = Explorer(open_run(trained.root / "run"), torch.device("cpu"))
    labels: list[int | None] = []
    monkeypatch.setattr(
        explorer, "invert", lambda _, label: labels.append(label) or InvertedImage(
            *[torch.zeros(1, 8, 8, dtype=torch.uint8)] * 4, "")
    )  # fmt: skip
    monkeypatch.setattr(explorer, "read", lambda _: None)
    page = app.build(explorer)
    boxes = [block for block in page.blocks.values() if isinstance(block, gradio.Dropdown)]
    box = next(each for each in boxes if each.label == "Class of the image")
    assert [name for name, _ in box.choices] == ["unknown", "cat", "unknown"]
    handlers = [each.fn for each in page.fns.values() if each.name == "invert"]
    for _, value in box.choices:
        handlers[0]("image.png", box.preprocess(value))
    assert labels == [None, 0, 1]


def test_a_port_in_use(trained: World, capsys: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, line = say(capsys, "explore", "--run", trained.root / "run", "--port", port)
    assert code == 2
    assert line.startswith(f"error: port {port} of 127.0.0.1 cannot be opened")


def test_a_mistake_is_an_error_of_the_command(trained: World, capsys: Any) -> None:
    """The page would only show it to whoever samples."""
    words = ("explore", "--run", trained.root / "run", "--port", free_port())
    for option, value in (("--guidance", "nan"), ("--guide", "/nowhere"), ("--device", "tpu")):
        code, _, line = say(capsys, *words, option, value)
        assert code == 2 and line.startswith("error: ")


def test_gradio_is_not_installed(
    trained: World, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    run, port = trained.root / "run", free_port()
    code, _, line = say(capsys, "explore", "--run", run, "--port", port)
    assert code == 2 and "pip install 'jkoflow[explore]'" in line
