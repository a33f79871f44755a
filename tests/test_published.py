"""Published files of weights: recognized, kept, fetched, refused."""

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from dkdm.data.published import Published
from dkdm.errors import DkdmError, UsageError
from dkdm.reading.lock import LOCK

WEIGHTS = b"the weights"
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def published(address="http://127.0.0.1:9/nothing", forms=None):
    return Published("the network", "--weights", forms or {DIGEST: "whole"}, address)


def kept_in(folder):
    """What a folder holds, but for its lock."""
    return [path.name for path in folder.iterdir() if path.name != LOCK]


@contextmanager
def served(content, status=200, before=lambda: None):
    """The address of a server on this machine that answers everything with `content`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            before()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/weights.pt"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_file_is_kept_and_found_again(tmp_path, cache):
    file = tmp_path / "any name.bin"
    file.write_bytes(WEIGHTS)
    assert published().find(file) == (cache / DIGEST, "whole")
    file.unlink()
    assert published().find() == (cache / DIGEST, "whole")
    assert (cache / DIGEST).read_bytes() == WEIGHTS


def test_a_folder_is_looked_through(tmp_path, cache):
    for name, content in (("a.txt", b"notes"), ("b.pt", WEIGHTS)):
        (tmp_path / name).write_bytes(content)
    assert published().find(tmp_path) == (cache / DIGEST, "whole")
    (tmp_path / "b.pt").unlink()
    with pytest.raises(UsageError, match="the network is not in it; fetch http://127"):
        published().find(tmp_path)


def test_the_first_digits_are_enough_and_tell_the_form(tmp_path, cache):
    (tmp_path / "file").write_bytes(WEIGHTS)
    forms = {"0" * 8: "other", DIGEST[:8]: "short"}
    assert published(forms=forms).find(tmp_path / "file") == (cache / DIGEST, "short")


def test_another_file_is_refused_and_not_kept(tmp_path, cache):
    (tmp_path / "file").write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(UsageError) as told:
        published().find(tmp_path / "file")
    assert f"file is not the network: its SHA-256 is {found}, not {DIGEST}" in str(told.value)
    assert not cache.exists()


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(UsageError, match=r"--weights .*nowhere.pt: there is no such file"):
        published().find(tmp_path / "nowhere.pt")


def test_nothing_in_the_cache_says_what_to_do():
    with pytest.raises(UsageError) as told:
        published().find()
    assert "give --weights download, which fetches it from http://127" in str(told.value)
    assert "or --weights FOLDER" in str(told.value)


def test_a_damaged_copy_is_not_used_and_is_replaced(tmp_path, cache):
    (tmp_path / "file").write_bytes(WEIGHTS)
    published().find(tmp_path / "file")
    (cache / DIGEST).write_bytes(WEIGHTS[:-1])
    with pytest.raises(UsageError, match="is not in"):
        published().find()
    assert published().find(tmp_path / "file") == (cache / DIGEST, "whole")
    assert (cache / DIGEST).read_bytes() == WEIGHTS


def test_download(cache):
    with served(WEIGHTS) as address:
        assert published(address).find("download") == (cache / DIGEST, "whole")
    assert published(address).find() == (cache / DIGEST, "whole")
    assert published(address).find("download") == (cache / DIGEST, "whole")  # nobody answers now
    assert kept_in(cache) == [DIGEST]


def test_those_who_fetch_at_the_same_time_fetch_once(cache):
    asked = []

    def wait_for_others():
        asked.append(len(asked))
        others[len(asked)].start()
        others[len(asked)].join(0.2)  # it waits for the lock, or has finished

    def fetch():
        found.append(published(address).find("download"))

    found, others = [], [threading.Thread(target=fetch) for _ in range(4)]
    with served(WEIGHTS, before=wait_for_others) as address:
        others[0].start()
        others[0].join()
        others[1].join()
    assert found == [(cache / DIGEST, "whole")] * 2
    assert asked == [0]


def test_the_form_at_the_address_comes_first(tmp_path, cache):
    (tmp_path / "small").write_bytes(b"a part")
    part = hashlib.sha256(b"a part").hexdigest()
    forms = {part: "small", DIGEST: "whole"}
    published(forms=forms).find(tmp_path / "small")
    assert published(forms=forms).find() == (cache / part, "small")
    with served(WEIGHTS) as address:
        assert published(address, forms).find("download") == (cache / DIGEST, "whole")
    assert published(forms=forms).find() == (cache / DIGEST, "whole")


def test_a_download_of_another_file_leaves_nothing(cache):
    with served(b"an error page") as address, pytest.raises(UsageError, match="is not the network"):
        published(address).find("download")
    assert kept_in(cache) == []


def test_a_server_that_refuses():
    with served(b"", 404) as address, pytest.raises(DkdmError) as told:
        published(address).find("download")
    assert "404" in str(told.value)
    assert "fetch it on a machine with a network and give --weights FOLDER" in str(told.value)


def test_offline(cache):
    with served(WEIGHTS) as address:
        pass
    with pytest.raises(DkdmError) as told:
        published(address).find("download")
    assert f"{address} cannot be fetched" in str(told.value)
    assert "\n" not in str(told.value)
    assert kept_in(cache) == []


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(WEIGHTS)
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(DkdmError, match="cannot be kept in .*: set DKDM_CACHE to a folder"):
        published().find(tmp_path / "file")
    with pytest.raises(DkdmError, match="cannot be fetched"):
        published().find("download")
