"""The audit log shows every change to it, at its line."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import strategies.audit
from strategies.audit import FIRST, AuditLog
from strategies.errors import FederationError

ENTRIES = 5


@pytest.fixture
def log(tmp_path) -> AuditLog:
    """A log that was never begun."""
    return AuditLog(tmp_path / "audit.jsonl")


def filled(folder: Path) -> AuditLog:
    log = AuditLog(folder / "audit.jsonl")
    log.create()
    for number in range(1, ENTRIES):
        log.append("answered", server_round=number, status="ok", share=number / 8, last=False)
    return log


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> bytes:
    return filled(tmp_path_factory.mktemp("audit")).path.read_bytes()


@pytest.fixture
def changed(log, intact):
    """Write a changed log and return where the damage is found."""

    def check(lines: list[bytes]) -> str:
        log.path.write_bytes(b"".join(lines))
        with pytest.raises(FederationError) as caught:
            log.verify()
        assert "\n" not in str(caught.value)
        assert caught.value.hint == "restore the log from a backup and find out who changed it"
        return str(caught.value)

    return check


def test_an_untouched_log_verifies(tmp_path):
    log = filled(tmp_path)
    head = json.loads(log.path.read_text().splitlines()[-1])["hash"]
    assert log.verify() == (ENTRIES, head)


@pytest.mark.parametrize("content", [None, b""])
def test_a_log_that_is_gone_is_no_empty_log(log, content):
    """Who deletes it hides what happened; only a new site begins one."""
    if content is not None:
        log.path.write_bytes(content)
    for use in (log.verify, lambda: log.append("received")):
        with pytest.raises(FederationError, match=r"^audit log audit\.jsonl is missing or empty$"):
            use()


def test_a_log_is_begun_once(log):
    log.create()
    begun = log.path.read_bytes()
    log.create()
    assert log.path.read_bytes() == begun
    assert json.loads(begun)["event"] == "created"


def test_a_log_whose_beginning_was_interrupted_is_begun_again(log):
    log.path.touch()
    log.create()
    assert log.verify()[0] == 1


def test_an_entry_says_what_happened_and_points_to_the_one_before(log):
    log.create()
    first = log.append("received", task="train")
    second = log.append("answered", status="ok")
    entries = [json.loads(line) for line in log.path.read_text().splitlines()][1:]
    assert [entry["hash"] for entry in entries] == [first, second]
    begun = json.loads(log.path.read_text().splitlines()[0])
    assert (begun["index"], begun["previous"]) == (0, FIRST)
    assert [entry["previous"] for entry in entries] == [begun["hash"], first]
    assert [entry["index"] for entry in entries] == [1, 2]
    assert [entry["event"] for entry in entries] == ["received", "answered"]
    assert entries[0]["fields"] == {"task": "train"}
    assert entries[0]["time"].endswith("+00:00")


@settings(max_examples=60)
@given(line=st.integers(0, ENTRIES - 1), data=st.data())
def test_an_edited_line_is_found_at_its_number(tmp_path_factory, intact, line, data):
    lines = intact.splitlines(keepends=True)
    place = data.draw(st.integers(0, len(lines[line]) - 2), label="place")
    byte = data.draw(
        st.integers(0, 127).filter(lambda b: b != lines[line][place] and b not in (10, 13)),
        label="byte",
    )
    lines[line] = lines[line][:place] + bytes([byte]) + lines[line][place + 1 :]
    log = AuditLog(tmp_path_factory.mktemp("edited") / "audit.jsonl")
    log.path.write_bytes(b"".join(lines))
    with pytest.raises(FederationError, match=f"^audit log audit.jsonl line {line + 1}: content"):
        log.verify()


@pytest.mark.parametrize("line", range(1, ENTRIES))
@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace(b'"status":"ok"', b'"status":"refused"'),
        lambda text: text.replace(b'"event":"answered",', b""),
        lambda text: text.replace(b'"fields":', b'"fields": '),
        lambda text: b'{"event":"other",' + text[1:],
        lambda text: text[: len(text) // 2] + b"\n",
        lambda text: b"\n" + text,
        lambda text: b"null\n",
        lambda text: b'{"hash":NaN}\n',
        lambda text: b"\xff" + text,
    ],
    ids=["value", "key", "space", "twice", "cut", "blank", "null", "nan", "not-utf8"],
)
def test_any_edit_is_found(changed, intact, line, edit):
    lines = intact.splitlines(keepends=True)
    lines[line] = edit(lines[line])
    assert changed(lines).startswith(f"audit log audit.jsonl line {line + 1}: content and hash")


@pytest.mark.parametrize("line", range(ENTRIES - 1))
def test_a_removed_line_is_found_at_the_line_that_took_its_place(changed, intact, line):
    lines = intact.splitlines(keepends=True)
    del lines[line]
    assert changed(lines) == (
        f"audit log audit.jsonl line {line + 1}: a line before it is missing or moved"
    )


@pytest.mark.parametrize("line", range(ENTRIES))
def test_a_repeated_line_is_found(changed, intact, line):
    lines = intact.splitlines(keepends=True)
    lines.insert(line, lines[line])
    assert f"line {line + 2}: a line before it" in changed(lines)


@pytest.mark.parametrize("line", range(ENTRIES - 1))
def test_reordered_lines_are_found(changed, intact, line):
    lines = intact.splitlines(keepends=True)
    lines[line], lines[line + 1] = lines[line + 1], lines[line]
    assert f"line {line + 1}: a line before it is missing or moved" in changed(lines)


def test_a_line_rewritten_with_a_new_hash_breaks_the_next(log, changed, intact, tmp_path):
    lines = intact.splitlines(keepends=True)
    forged = AuditLog(tmp_path / "forged.jsonl")
    forged.path.write_bytes(b"".join(lines[:2]))
    forged.append("answered", server_round=2, status="refused")
    lines[2] = forged.path.read_bytes().splitlines(keepends=True)[2]
    assert "line 4: a line before it is missing or moved" in changed(lines)


@pytest.mark.parametrize(
    "last", [b"null\n", b"\n", b"\xff\n", b'{"hash":1}\n'], ids=["null", "blank", "binary", "odd"]
)
def test_nothing_is_appended_to_a_damaged_log(log, intact, last):
    log.path.write_bytes(intact + last)
    with pytest.raises(FederationError, match=f"line {ENTRIES + 1}: content and hash"):
        log.append("received")
    assert log.path.read_bytes() == intact + last


@pytest.mark.parametrize("kept", [-1, -40])
def test_a_line_cut_by_a_power_failure_is_told_as_such(log, intact, kept):
    log.path.write_bytes(intact[:kept])
    for use in (log.verify, lambda: log.append("received")):
        with pytest.raises(FederationError, match=f"line {ENTRIES}: incomplete") as caught:
            use()
        assert "remove that line" in caught.value.hint
    assert log.path.read_bytes() == intact[:kept]


def _append(path: str, writer: int, count: int) -> None:
    log = AuditLog(Path(path))
    for number in range(count):
        log.append("answered", writer=writer, number=number)


def test_two_processes_keep_one_chain(log):
    log.create()
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append, args=(str(log.path), w, 40)) for w in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert log.verify()[0] == 1 + 80
    entries = [json.loads(line)["fields"] for line in log.path.read_text().splitlines()][1:]
    for w in range(2):
        assert [e["number"] for e in entries if e["writer"] == w] == list(range(40))


@settings(max_examples=200)
@given(lines=st.lists(st.binary(max_size=9)), block=st.integers(1, 8))
def test_the_last_line_read_from_the_end_is_that_of_the_whole_log(tmp_path_factory, lines, block):
    log = AuditLog(tmp_path_factory.getbasetemp() / "last-line.jsonl")
    log.path.write_bytes(b"\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies.audit, "BLOCK_BYTES", block)
        assert log._last_line() == [b"", *log._lines()][-1]


def test_appending_reads_the_end_of_a_long_log_alone(log, monkeypatch):
    log.create()
    log.append("received", note="x" * 3 * strategies.audit.BLOCK_BYTES)
    monkeypatch.setattr(AuditLog, "_lines", lambda self: pytest.fail("read whole"))
    log.append("answered")
    log.append("answered")
    monkeypatch.undo()
    assert log.verify()[0] == 4
