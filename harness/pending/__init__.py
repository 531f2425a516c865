"""Compared snapshots between a run of the suites and the person who reviews them.

`record_run` and `record_case` are what a run calls; `read_records`, `read_case`, `accept` and
`reject` what a review does. Imports neither torch nor pytest, and opens thousands of cases at once.
"""

from harness.pending.deciding import (
    Decided,
    accept,
    reject,
    snapshots_folder,
)
from harness.pending.files import (
    FOLDER,
    Broken,
    Records,
    Run,
    read_case,
    read_records,
    record_case,
    record_run,
    stack_conditions,
)
from harness.pending.form import Record
from harness.pending.values import Alternative, Case, Position, Side

__all__ = [
    "FOLDER",
    "Alternative",
    "Broken",
    "Case",
    "Decided",
    "Position",
    "Record",
    "Records",
    "Run",
    "Side",
    "accept",
    "read_case",
    "read_records",
    "record_case",
    "record_run",
    "reject",
    "snapshots_folder",
    "stack_conditions",
]
