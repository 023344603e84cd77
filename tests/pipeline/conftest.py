"""Fixtures of the pipeline's tests."""

from __future__ import annotations

import http.server
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from tests.pipeline.asset_server import serving
from tests.pipeline.tiny import World, make_world, run_child


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    return Accelerator()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Pictures, autoencoder and configuration of its own; this process uses its data root."""
    world = make_world(tmp_path)
    monkeypatch.setenv("JKOFLOW_HOME", str(world.home))
    return world


@pytest.fixture(scope="session")
def trained_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with a latent cache and a finished run at `run`; copy what you change."""
    world = make_world(tmp_path_factory.mktemp("trained"))
    run_child("encode", "--config", world.config(), env=world.environment)
    run_child(
        "train", "--config", world.config(), "--run", world.root / "run", env=world.environment
    )
    return world


@pytest.fixture
def trained(trained_world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The same, with its data root in use here; leave it as it is."""
    monkeypatch.setenv("JKOFLOW_HOME", str(trained_world.home))
    return trained_world


@pytest.fixture
def run(trained: World, tmp_path: Path) -> Path:
    """The finished run, to be changed at will."""
    return Path(shutil.copytree(trained.root / "run", tmp_path / "run"))


@pytest.fixture
def folder(trained: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run, with a data root that begins with no features."""
    home = tmp_path / "home"
    shutil.copytree(trained.home, home, ignore=shutil.ignore_patterns("features"))
    monkeypatch.setenv("JKOFLOW_HOME", str(home))
    return Path(shutil.copytree(trained.root / "run", tmp_path / "run"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium of the system, driven by Playwright."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """File system of s3, for which a server of moto on this machine stands."""
    s3fs = pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (("ENDPOINT_URL", f"http://{host}:{port}"), ("DEFAULT_REGION", "us-east-1"),
                        ("ACCESS_KEY_ID", "any"), ("SECRET_ACCESS_KEY", "any")):  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3fs.S3FileSystem(skip_instance_cache=True)
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment without credentials of s3."""
    s3fs = pytest.importorskip("s3fs")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "PROFILE", "SESSION_TOKEN"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    for name, value in (("EC2_METADATA_DISABLED", "true"), ("CONFIG_FILE", "/nonexistent"),
                        ("SHARED_CREDENTIALS_FILE", "/nonexistent")):  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()
