"""Imported inside the sandbox before its doors are locked, to see what is there besides the audit hook."""

from __future__ import annotations

import errno
import socket
from typing import Any

with socket.socket() as _probe:
    _probe.settimeout(2)
    _ERROR = _probe.connect_ex(("127.0.0.1", 9))  # nobody listens there


def network(question: Any, say: Any) -> str:
    """The name of the error that a connection to this machine ended with; a refusal comes from a network that is there."""
    return errno.errorcode.get(_ERROR, str(_ERROR))
