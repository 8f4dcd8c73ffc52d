"""Downloads resume, verify, and leave nothing half-done under the final name."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from client.data import medmnist
from client.data.download import RECEIVE_CHUNK_BYTES, download, md5_of
from fakes.miniatures import zipped
from strategies.errors import ConfigError, DataError
from strategies.files import held

CONTENT = bytes(range(256)) * 2000
ZIP = zipped({"a.png": bytes(range(256)) * 500, "b/c.png": bytes(range(255, -1, -1)) * 900})
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT; the server's attributes choose its faults and record what was asked."""

    def do_GET(self):
        self.server.ranges.append(self.headers.get("Range"))
        if "missing" in self.path:
            self.send_error(404)
            return
        start = self._start()
        content = self.server.content
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.server.stop_at])

    def _start(self) -> int:
        asked = self.headers.get("Range")
        if asked is None or not self.server.knows_ranges:
            return 0
        return int(asked.removeprefix("bytes=").removesuffix("-"))

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.knows_ranges, httpd.stop_at, httpd.ranges = True, None, []
    httpd.content = CONTENT
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/file.npz"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "data" / "file.npz"


def part_of(target):
    return target.with_name("file.npz.part")


def begun(target, content):
    target.parent.mkdir()
    part_of(target).write_bytes(content)


def test_a_download_arrives_whole_and_leaves_no_part(server, target):
    assert download(server.url, target, MD5) == target
    assert target.read_bytes() == CONTENT
    assert md5_of(target) == MD5
    assert not part_of(target).exists()
    assert server.ranges == [None]


def test_a_begun_download_continues_where_it_stopped(server, target):
    begun(target, CONTENT[:1000])
    download(server.url, target, MD5)
    assert target.read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_a_server_without_ranges_sends_the_whole_file_again(server, target):
    begun(target, b"x" * 1000)
    server.knows_ranges = False
    download(server.url, target, MD5)
    assert target.read_bytes() == CONTENT


def test_a_lost_connection_keeps_the_part_and_the_next_attempt_completes_it(server, target):
    server.stop_at = 300_000
    with pytest.raises(
        DataError, match=r"failed after \d+ bytes: the connection was lost"
    ) as error:
        download(server.url, target, MD5)
    assert "continues where it stopped" in error.value.hint
    assert not target.exists()
    kept = part_of(target).read_bytes()
    assert len(kept) > 300_000 - RECEIVE_CHUNK_BYTES
    assert CONTENT.startswith(kept)

    server.stop_at = None
    download(server.url, target, MD5)
    assert target.read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={len(kept)}-"]


def test_a_complete_part_only_needs_its_md5(server, target):
    begun(target, CONTENT)
    download(server.url, target, MD5)
    assert target.read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize("start", [b"", b"y" * 1000, CONTENT + b"z"])
def test_a_file_with_another_md5_is_removed_and_both_md5s_are_told(server, target, start):
    if start:
        begun(target, start)
    expected = MD5 if start else "0" * 32
    with pytest.raises(DataError, match=f"md5=[0-9a-f]{{32}} expected={expected}; removed"):
        download(server.url, target, expected)
    assert not target.exists()
    assert not part_of(target).exists()


def test_an_answer_other_than_the_file_is_told_by_its_number(server, target):
    begun(target, CONTENT[:10])
    with pytest.raises(DataError, match="failed after 10 bytes: the server answered HTTP 404"):
        download(server.url.replace("file", "missing"), target, MD5)
    assert part_of(target).read_bytes() == CONTENT[:10]


def test_no_network_is_said_plainly_and_the_part_is_kept(server, target):
    begun(target, CONTENT[:10])
    closed = server.url.replace(str(server.server_port), "9")
    with pytest.raises(DataError, match="failed after 10 bytes: no connection") as error:
        download(closed, target, MD5)
    assert "\n" not in str(error.value)
    assert f"copy file.npz from another machine into {target.parent}" in error.value.hint
    assert part_of(target).read_bytes() == CONTENT[:10]


def test_a_server_that_stays_silent_is_given_up(server, target, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(Handler, "do_GET", lambda _: release.wait(20))
    monkeypatch.setattr("client.data.download.READ_SECONDS", 0.2)
    with pytest.raises(DataError, match=r"no answer within 0\.2 seconds"):
        download(server.url, target, MD5)
    release.set()


def test_a_folder_that_cannot_be_made_is_told(server, tmp_path):
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=r"data cannot be made \(File exists\)"):
        download(server.url, tmp_path / "data" / "file.npz", MD5)


def test_one_process_at_a_time_downloads_a_file(server, target):
    target.parent.mkdir()
    with (
        held(target.with_name(".file.npz.lock"), ConfigError("first")),
        pytest.raises(ConfigError, match="is under way in another process"),
    ):
        download(server.url, target, MD5)
    assert server.ranges == []
    download(server.url, target, MD5)
    assert download(server.url, target, MD5) == target
    assert server.ranges == [None], "what another process has fetched meanwhile is taken"


def test_fetch_takes_the_official_file_of_the_size_from_the_record(server, tmp_path, monkeypatch):
    asked = []

    def record(url, target, md5):
        asked.append((url, target, md5))
        return target

    monkeypatch.setattr(medmnist, "download", record)
    path = medmnist.fetch("breastmnist", 64, tmp_path)
    assert path == tmp_path / "breastmnist_64.npz"
    url = "https://zenodo.org/records/10519652/files/breastmnist_64.npz?download=1"
    assert asked == [(url, path, "742edef2a1fd1524b2efff4bd7ba9364")]


# --- archives whose MD5 nobody published


def test_an_archive_without_an_md5_is_proven_by_its_own_checksums(server, target):
    server.content = ZIP
    assert download(server.url, target, None) == target
    assert target.read_bytes() == ZIP
    assert not part_of(target).exists()


def test_an_archive_that_was_cut_off_is_continued(server, target):
    server.content, server.stop_at = ZIP, 200_000
    with pytest.raises(DataError, match="the connection was lost"):
        download(server.url, target, None)
    kept = part_of(target).stat().st_size
    server.stop_at = None
    download(server.url, target, None)
    assert target.read_bytes() == ZIP
    assert server.ranges == [None, f"bytes={kept}-"]


@pytest.mark.parametrize("where", [100, 200_000, len(ZIP) - 10])
def test_an_archive_that_was_changed_on_the_way_is_removed(server, target, where):
    changed = bytearray(ZIP)
    changed[where] ^= 0xFF
    server.content = bytes(changed)
    with pytest.raises(DataError, match=r"is no whole zip archive: .*; removed") as error:
        download(server.url, target, None)
    assert "\n" not in str(error.value)
    assert not target.exists()
    assert not part_of(target).exists()


def test_a_page_that_says_sorry_is_no_archive(server, target):
    server.content = b"<html>The file has moved.</html>"
    with pytest.raises(DataError, match="is no whole zip archive: File is not a zip file; removed"):
        download(server.url, target, None)
    assert not target.exists()
    assert not part_of(target).exists()
