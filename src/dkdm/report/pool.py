"""What the pool looked like when the run ended."""

from __future__ import annotations

from markupsafe import Markup

from dkdm.evaluation.pool_state import PoolState
from dkdm.report.maps import bar_chart


def pool_charts(pool: PoolState | None) -> dict[str, Markup | None]:
    """Histograms of levels and ages; None for one without entries."""
    if pool is None:
        return {"t": None, "age": None}
    even = sum(pool.t.counts) / max(len(pool.t.counts), 1)
    return {
        "t": bar_chart(
            "How many entries of the pool are at which noise levels",
            pool.t.counts,
            pool.t.end,
            "noise level t",
            "entries",
            even,
        ),
        "age": bar_chart(
            "How many batches ago the chains of the pool's entries began",
            pool.age.counts,
            pool.age.end,
            "batches since the chain began",
            "entries",
        ),
    }


def ages_in_words(pool: PoolState) -> str:
    """Which entries are older than the run's chains, if any."""
    found = []
    if pool.as_filled:
        found.append(f"{pool.as_filled:,} are still on the chain they were filled with")
    if pool.unknown:
        found.append(f"the age of {pool.unknown:,} is not known: an earlier version began them")
    return "; ".join(found)
