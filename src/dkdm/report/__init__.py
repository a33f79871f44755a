"""The page of a run: teacher and student from the same noise, and how it came about.

`report.html` is built from the files of the run folder alone, needs no other file or address to be
shown, and says which parts are missing.
"""

from dkdm.report.page import write_report

__all__ = ["write_report"]
