"""Files are old or new, never in between, and readable by whom they should be."""

from __future__ import annotations

import errno
import os
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.files import append_line, sync_folder, write_atomic


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@settings(max_examples=20)
@given(content=st.binary(max_size=100) | st.text(st.characters(codec="utf-8"), max_size=50))
def test_what_is_written_is_read(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("files") / "file"
    write_atomic(path, "an older and longer content")
    write_atomic(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace", "fchmod"])
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch, call, kind):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fails(*arguments):
        raise kind("no space left")

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(kind, match="no space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_reader_never_sees_a_part(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    seen = []
    replace, fsync = os.replace, os.fsync

    def watched(order):
        def call(*arguments):
            seen.append((order.__name__, path.read_bytes()))
            order(*arguments)
            seen.append((order.__name__, path.read_bytes()))

        return call

    monkeypatch.setattr(os, "replace", watched(replace))
    monkeypatch.setattr(os, "fsync", watched(fsync))
    write_atomic(path, b"new" * 10_000)
    # Synced before it gets its name, and the name synced after: fsync, rename, fsync.
    new = b"new" * 10_000
    assert seen == [
        ("fsync", b"old"),
        ("fsync", b"old"),
        ("replace", b"old"),
        ("replace", new),
        ("fsync", new),
        ("fsync", new),
    ]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640])
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_file_has_the_mode_that_was_asked_for(tmp_path, mode, umask):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o666)
    before = os.umask(umask)
    try:
        write_atomic(path, b"new", mode=mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_secret_is_never_readable_by_others_on_the_way(tmp_path, monkeypatch):
    modes = []
    replace = os.replace

    def watched(source, target):
        modes.append(stat.S_IMODE(os.stat(source).st_mode))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write_atomic(tmp_path / "secret", b"x", mode=0o600)
    assert modes == [0o600]


def test_lines_are_appended_and_synced(tmp_path, monkeypatch):
    path = tmp_path / "log"
    synced = []
    fsync = os.fsync

    def watched(handle):
        synced.append(os.path.realpath(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    append_line(path, "one")
    assert synced == [str(tmp_path), str(path)], "a new file's name is kept too"
    append_line(path, "zw\u00f6lf")
    assert synced[2:] == [str(path)]
    assert path.read_text(encoding="utf-8") == "one\nzw\u00f6lf\n"


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_of_a_line_that_does_not_fit_nothing_stays(tmp_path, monkeypatch, call):
    path = tmp_path / "log"
    append_line(path, "one")
    write, real = os.write, getattr(os, call)
    calls = iter([lambda handle, *data: write(handle, data[0][:2])] if call == "write" else [])

    def full(*arguments):
        for part in calls:
            return part(*arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            append_line(path, "two")
    assert getattr(os, call) is real
    assert path.read_text() == "one\n"
    append_line(path, "two")
    assert path.read_text() == "one\ntwo\n"


def test_syncing_a_folder_leaks_no_handle(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        sync_folder(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
