"""The error tree: every failure a person can act on is one of these.

    FederationError            exit code 1: something failed while running
    ├── ConfigError            exit code 2: a value, flag or file a person can fix
    │   ├── DataError          images, labels or their files
    │   └── CheckpointError    a checkpoint that is damaged or of another run or model
    ├── ProtocolError          a message breaks the wire contract (records.py)
    ├── SignatureError         a signature is missing, wrong, or of an unknown key
    ├── RefusalError           a site declines an instruction; its reason may leave the site
    ├── QuorumError            exit code 3: fewer valid replies than the run asks for
    └── StoppedError           exit code 130: a person ended it; what was reached is kept

Invariant: ``str(error)`` is one line of the form ``name=value ... expected ...`` and ``hint`` says
what to do. Texts that leave a site (RefusalError) hold no path, file name or identifier.
"""

from __future__ import annotations


class FederationError(Exception):
    """Base of all failures that are reported in one line.

    Attributes:
        hint: What the reader can do about it; empty when there is nothing to add.
        exit_code: What the process returns when this ends it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(FederationError):
    """A value, flag or file that a person can fix."""

    exit_code = 2


class DataError(ConfigError):
    """Images or labels that are missing, unreadable, altered or not what was declared."""


class CheckpointError(ConfigError):
    """A checkpoint that is damaged, or belongs to another run or architecture."""


class ProtocolError(FederationError):
    """A message that breaks the wire contract."""


class SignatureError(FederationError):
    """A signature that is missing, wrong, or made by a key nobody admitted."""


class RefusalError(FederationError):
    """A site declines an instruction.

    Leaves the site: ``code`` and the message, which therefore name limits and never data.
    """

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.code = code


class QuorumError(FederationError):
    """Fewer sites, or fewer valid replies, than the run asks for."""

    exit_code = 3


class StoppedError(FederationError):
    """A person ended a run before it was complete; what was reached is kept."""

    exit_code = 130
