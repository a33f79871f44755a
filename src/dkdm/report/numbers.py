"""Numbers as a reader wants them: few digits, units, and ratios in words."""

from __future__ import annotations

import math

UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def count(value: float) -> str:
    """A count in three digits: 9,412, 393 k, 1.81 M, 75.8 M, 2.10 G."""
    return " ".join(filter(None, in_units(value)))


def in_units(value: float) -> tuple[str, str]:
    """A count in three digits, and the unit it is in: ('1.81', 'M'); whole below 10,000."""
    if value < 10_000:
        return f"{value:,.0f}", ""
    unit, size = next((unit, size) for unit, size in UNITS if value >= size)
    return number(value / size), unit


def number(value: float, digits: int = 3) -> str:
    """A few significant digits, never with an exponent: 1,234, 12.3, 0.0123."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def percent(share: float) -> str:
    """A share of 1 as percent."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> tuple[str, str]:
    """Seconds, minutes or hours, whichever reads best, and the unit."""
    if seconds < 90:
        return f"{seconds:.0f}", "s"
    return (f"{seconds / 60:.0f}", "min") if seconds < 7200 else (f"{seconds / 3600:.1f}", "h")


def compared(value: float, base: float) -> tuple[str, str]:
    """How many times more or less than the teacher's: ('4.6 ×', 'fewer')."""
    if not value or not base:
        return count(value), ""
    if 0.95 < value / base < 1.05:
        return "as many", ""
    if value < base:
        return f"{number(base / value, digits=2)} ×", "fewer"
    return f"{number(value / base, digits=2)} ×", "more"
