"""A TCP link of the test's own between a site and the superlink: to be cut, healed and slowed."""

from __future__ import annotations

import select
import socket
import threading
import time
from contextlib import suppress

CHUNK = 16 * 1024
UPLOAD = 2**20


class Link:
    """Forwards ``address`` (this machine) to a port, one thread a connection.

    Attributes:
        bytes_per_second: Of all connections together; None: as fast as it goes.
        carried: Bytes so far, both ways.
        refused: Connections that were tried while it was cut.
        lost_receipts: As many answers to uploads as this are still to be lost with their
            connection.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.bytes_per_second: float | None = None
        self.carried = self.refused = self.lost_receipts = 0
        self._cut = self._silent = False
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._free_at = 0.0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Reset every connection and refuse new ones, as a broken line does."""
        self._cut = True
        self.reset()

    def reset(self) -> None:
        """Reset every connection, as a bad line does now and then."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            _close(pair)

    def silence(self) -> None:
        """Let nothing through any more, without a word to either end, as a dead cable does."""
        self._silent = True

    def heal(self) -> None:
        """Let connections through again, at full speed."""
        self._cut, self._silent, self.bytes_per_second = False, False, None

    def close(self) -> None:
        """End for good."""
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                inner, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(inner,), daemon=True).start()

    def _carry(self, inner: socket.socket) -> None:
        if self._cut:
            self.refused += 1
            inner.close()
            return
        self._hold()
        try:
            outer = socket.create_connection(("127.0.0.1", self._target), timeout=10)
        except OSError:
            inner.close()
            return
        outer.settimeout(None)
        pair, uploaded = (inner, outer), 0
        with self._lock:
            self._pairs.add(pair)
        try:
            while not self._cut:
                self._hold()
                ready, _, _ = select.select(pair, [], [], 0.5)
                for source in ready:
                    data = source.recv(CHUNK)
                    if not data:
                        return
                    if source is outer and uploaded >= UPLOAD and self.lost_receipts:
                        self.lost_receipts -= 1
                        return
                    uploaded = uploaded + len(data) if source is inner else 0
                    self._hold()
                    self._pace(len(data))
                    (outer if source is inner else inner).sendall(data)
        except (OSError, ValueError):
            pass
        finally:
            _close(pair)
            with self._lock:
                self._pairs.discard(pair)

    def _hold(self) -> None:
        while self._silent and not self._cut:
            time.sleep(0.05)

    def _pace(self, amount: int) -> None:
        with self._lock:
            self.carried += amount
            if self.bytes_per_second is None:
                return
            start = max(self._free_at, time.monotonic())
            self._free_at = start + amount / self.bytes_per_second
        time.sleep(max(0.0, self._free_at - time.monotonic()))


def _close(pair: tuple[socket.socket, socket.socket]) -> None:
    for end in pair:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
