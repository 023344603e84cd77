"""Downloads that break off, change, stall or are blocked."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.assets.fetch import install_asset
from pipeline.assets.mirrors import web_files
from pipeline.errors import JkoflowError
from tests.pipeline.asset_server import HALF, THING, Recorder, check_whole, thing, url


def test_an_interrupted_download_resumes(tmp_path, server):
    server.plan = ["break off"]
    assert install_asset(thing(url(server)), tmp_path) == tmp_path / "assets" / "thing"
    assert server.asked == [None, f"bytes={HALF}-"]
    check_whole(tmp_path)


def test_a_later_call_resumes_the_download(tmp_path, server):
    server.plan = ["break off", "404"]
    with pytest.raises(JkoflowError, match="HTTP 404"):
        install_asset(thing(url(server)), tmp_path)
    assert not (tmp_path / "assets" / "thing" / "manifest.json").exists()
    install_asset(thing(url(server)), tmp_path)
    assert server.asked[2:] == [f"bytes={HALF}-"]
    check_whole(tmp_path)


def test_a_changed_file_is_downloaded_from_its_beginning(tmp_path, server):
    server.data, server.etag, server.plan = THING[::-1], '"zero"', ["break off", "404"]
    with pytest.raises(JkoflowError):
        install_asset(thing(url(server)), tmp_path)
    server.data, server.etag = THING, '"one"'
    install_asset(thing(url(server)), tmp_path)
    assert len(server.asked) == 3
    check_whole(tmp_path)


def test_a_download_without_a_validator_is_not_resumed(tmp_path, server):
    server.etag, server.plan = None, ["break off"]
    install_asset(thing(url(server)), tmp_path)
    assert server.asked == [None, None]
    check_whole(tmp_path)


def test_a_server_without_ranges_restarts_the_download(tmp_path, server):
    server.plan = ["break off", "no ranges"]
    install_asset(thing(url(server)), tmp_path)
    assert server.asked == [None, f"bytes={HALF}-"]
    check_whole(tmp_path)


@pytest.mark.parametrize("harm", ["flipped", "longer"])
def test_a_damaged_partial_file_is_downloaded_again(tmp_path, server, harm):
    server.plan = ["break off", "404"]
    with pytest.raises(JkoflowError):
        install_asset(thing(url(server)), tmp_path)
    (part,) = tmp_path.glob("assets/thing/.partial/*/thing.bin.part")
    data = part.read_bytes()
    assert data == THING[:HALF]
    part.write_bytes(b"x" + data[1:] if harm == "flipped" else THING + b"more")
    install_asset(thing(url(server)), tmp_path)
    assert server.asked[-1] is None
    check_whole(tmp_path)


def test_the_next_mirror_follows_a_host_that_never_answers(tmp_path, server):
    said: list[str] = []
    blocked = web_files(server.base + "blocked/", "thing.bin", answer_seconds=0.2)
    server.plan = ["silent"]
    install_asset(thing(blocked, url(server)), tmp_path, log=said.append)
    assert f"the thing: not from {blocked.label}: no answer within 0.2 s" in said
    assert f"the thing: fetched from {server.base}thing.bin, stored in" in said[-1]
    assert len(server.asked) == 2, "a blocked host is not asked twice"
    check_whole(tmp_path)


def test_the_next_mirror_follows_one_with_other_content(tmp_path, server):
    (tmp_path / "impostor").mkdir()
    (tmp_path / "impostor" / "thing.bin").write_bytes(THING[:-1] + b"?")

    class Impostor(Recorder):
        def download_files(self, partial: Path, scratch: Path) -> Path:
            return tmp_path / "impostor"

    said: list[str] = []
    install_asset(thing(Impostor("impostor"), url(server)), tmp_path, log=said.append)
    assert "the thing: not from impostor: its content is not the thing" in said
    check_whole(tmp_path)


def test_a_refused_connection_is_an_error(tmp_path):
    mirror = web_files("http://127.0.0.1:9/", "thing.bin")
    with pytest.raises(JkoflowError, match="Connection refused"):
        install_asset(thing(mirror), tmp_path)


def test_a_weak_validator_resumes_nothing(tmp_path, server):
    """It does not promise the same bytes."""
    server.etag, server.plan = 'W/"one"', ["break off"]
    install_asset(thing(url(server)), tmp_path)
    assert server.asked == [None, None]
    check_whole(tmp_path)
