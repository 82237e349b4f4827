"""One way to turn content into an identity, so that the same content has the same id on every machine and in every run."""

from __future__ import annotations

import hashlib
import json
from typing import Any

# Made once: `json.dumps` makes one for each call, which shows where every question is hashed.
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: Any) -> str:
    """Serialise `value` with sorted keys, no spaces and real Unicode; NaN and infinities are refused (ValueError)."""
    return _ENCODER.encode(value)


def content_hash(prefix: str, value: Any) -> str:
    """Hash `value` to `prefix` plus 32 hex digits (128 bits of BLAKE2b over its canonical JSON).

    The prefix names the kind and the version of the hash ("s1" a sample, "c1" a call), so that ids of two versions never
    pass for each other.
    """
    return prefix + hashlib.blake2b(canonical_json(value).encode(), digest_size=16).hexdigest()
