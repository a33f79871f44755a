"""Numbers as a reader wants them: few digits, units, and ratios in words."""

from __future__ import annotations

import math

COUNTS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
DURATIONS = (("days", 172_800, 86_400), ("h", 7200, 3600), ("min", 90, 60), ("s", 0, 1))


def count(value: float) -> str:
    """A count in three digits: 9,412, 393 k, 1.81 M, 75.8 M, 2.10 G."""
    if value < 10_000:
        return f"{value:,.0f}"
    unit, size = next((unit, size) for unit, size in COUNTS if value >= size)
    return f"{number(value / size)} {unit}"


def number(value: float, digits: int = 3) -> str:
    """A few significant digits, never with an exponent: 1,234, 12.3, 0.0123."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def percent(share: float) -> str:
    """A share of 1 as percent: 93.8 %; what rounds to 0 has no sign."""
    return f"{round(100 * share, 1) + 0.0:.1f} %"


def memory(mib: float) -> str:
    """Memory of so many MiB: 512 KiB, 6.89 MiB, 2.10 GiB."""
    unit, size = ("GiB", 2**10) if mib >= 2**10 else ("MiB", 1) if mib >= 1 else ("KiB", 2**-10)
    return f"{number(mib / size)} {unit}"


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best: 40 s, 33 min, 5.6 h, 2.1 days."""
    unit, size = next((unit, size) for unit, least, size in DURATIONS if seconds >= least)
    return f"{number(seconds / size, 2)} {unit}"


def ratio(value: float, base: float) -> str:
    """How many times the base it is: 1.50 ×, 0.00043 ×; nothing if the base is 0."""
    if not base:
        return ""
    found = value / base
    return f"{number(found, 3 if abs(found) >= 0.01 else 2)} ×"


def compared(value: float, base: float) -> str:
    """How many times higher or lower than the base: 4.6 × lower, 3.0 × higher, equal."""
    if not value or not base:
        return count(value)
    if 0.95 < value / base < 1.05:
        return "equal"
    if value < base:
        return f"{number(base / value, digits=2)} × lower"
    return f"{number(value / base, digits=2)} × higher"
