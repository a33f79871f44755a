"""The page of `dkdm compare`: numbers, samples and curves of several models, in one file."""

from __future__ import annotations

from collections.abc import Sequence

from dkdm.report.entries import Entry
from dkdm.report.html import render_page
from dkdm.report.overlaid import overlaid, style
from dkdm.report.rows_of_samples import rows_of_samples, strips_of
from dkdm.report.side_by_side import Table
from dkdm.report.tables import footnotes


def comparison_page(entries: Sequence[Entry], table: Table) -> str:
    """The page as HTML; every text in it is escaped."""
    blocks = [[*strips_of(rows)] for rows in rows_of_samples(entries, table.names)]
    return render_page(
        "compare.html.j2",
        table=table,
        columns=[
            (name, entry, style(i))
            for i, (name, entry) in enumerate(zip(table.names, entries, strict=True))
        ],
        notes=footnotes(table),
        blocks=blocks,
        charts=overlaid(entries, table.names),
    )
