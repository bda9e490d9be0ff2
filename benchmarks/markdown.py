"""Tables and numbers as the pages show them. Used by `publish.py` and `scaling.py`."""

from __future__ import annotations

import math


def markdown_table(columns: list[str], lines: list[list[str]], rule: str = "---:") -> str:
    """The first column to the left; the others as `rule` says, by default to the right."""
    rules = ["---", *[rule] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, rules, *lines])


def significant(value: float, digits: int) -> str:
    """3 digits: 0.0123, 1.23, 12.3, 123, 1,230."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.{digits - 1}e}")
    return f"{rounded:,.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def percent(share: float) -> str:
    return f"{significant(100 * share, 3)} %"
