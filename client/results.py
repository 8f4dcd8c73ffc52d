"""Answers that a site has worked out, kept until they have surely arrived.

A reply can be lost on its way, and a coordinator that was killed asks again for the round it had
not finished. The site then sends what it has: nothing is trained twice, and nothing is charged
twice.

Invariant: an answer is written whole before it is sent, under (run_uuid, task, round, hash of the
global weights); only an undamaged answer to exactly that question is found again. It is signed anew
for each message.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from strategies.arrays import hash_arrays
from strategies.files import make_folder, write_atomic
from strategies.identity import canonical
from strategies.records import Instruction, Reply

log = logging.getLogger(__name__)

KEEP = 4  # training and evaluation of the two rounds that a resumed run may ask for
SUFFIX = ".safetensors"


class Results:
    """The kept answers of one site."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, instruction: Instruction) -> Reply | None:
        """Return the answer to this question, without a message id; None where there is none."""
        question = _question(instruction)
        path = self._path(question)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                update = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            reply = Reply(**json.loads(metadata["reply"]), update=update)
            if metadata["sha256"] != _digest(question, reply):
                raise ValueError("content and hash do not agree")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            log.warning("kept answer not used: %s", error)
            return None
        return reply

    def keep(self, instruction: Instruction, reply: Reply) -> None:
        """Write an answer and drop all but the newest."""
        make_folder(self.folder, secret=True)
        kept = replace(reply, message_id="")
        fields = asdict(replace(kept, update={}))
        del fields["update"]
        question = _question(instruction)
        metadata = {"reply": json.dumps(fields), "sha256": _digest(question, kept)}
        newest = self._path(question)
        for left in self.folder.glob(
            f".*{SUFFIX}.*"
        ):  # by a process that was killed while it wrote
            left.unlink()
        write_atomic(newest, save(kept.update, metadata=metadata), mode=0o600)
        # Whatever the clock says: after it was set back, older answers look newer.
        others = [path for path in self.folder.glob(f"*{SUFFIX}") if path != newest]
        others.sort(key=lambda path: path.stat().st_mtime_ns)
        for old in others[: 1 - KEEP]:
            old.unlink()

    def _path(self, question: str) -> Path:
        return self.folder / f"{question}{SUFFIX}"


def _question(instruction: Instruction) -> str:
    """Return the name of what is asked; the order is not in it, for a resumed run has another."""
    document = {
        "run-uuid": instruction.run_uuid,
        "task": instruction.task,
        "server-round": instruction.server_round,
        "weights": hash_arrays(instruction.weights),
    }
    return hashlib.sha256(canonical(document)).hexdigest()


def _digest(question: str, reply: Reply) -> str:
    document = reply.signed_document(hash_arrays(reply.update))
    return hashlib.sha256(canonical({"question": question, "reply": document})).hexdigest()
