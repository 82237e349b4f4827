"""How a refusal is known: by the patterns of the `rules` filter, read as data since filters stand above the engine."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml


@cache
def refusal_pattern() -> str:
    """One regular expression that finds a refusal in an output, case apart."""
    form = yaml.safe_load((Path(__file__).parents[1] / "filters" / "data" / "form.yaml").read_text(encoding="utf-8"))
    patterns = [rule if isinstance(rule, str) else rule["find"] for rule in form["refusal"]["both"]]  # with or without its gate
    return "(?i)" + "|".join(f"(?:{pattern})" for pattern in patterns)
