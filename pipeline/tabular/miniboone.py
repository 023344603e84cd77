"""MINIBOONE: electron-neutrino events of the MiniBooNE experiment, D = 43.

The MAF paper's archive has the rows after its preprocessing: outliers and columns with many equal
values are left out (`datasets/miniboone.py`). What remains are the splits of `split_rows` and the
standardisation of `standardise`.
"""

from __future__ import annotations

from pipeline.tabular.table import (
    Table,
    check_values,
    find_file,
    read_npy,
    split_rows,
    standardise,
)

NAMES = ("miniboone/data.npy", "data.npy")
#: rows of the literature's experiments
ROWS = 36_488


def load_miniboone(path: str | None) -> Table:
    """Load MINIBOONE from `data.path`.

    Raises:
        UserError: the path is null, or the file is missing, damaged or of another width.
    """
    file = find_file(path, NAMES, "MINIBOONE")
    values = check_values(read_npy(file), 43, file)
    note = "the literature's rows and split"
    if len(values) != ROWS:
        note = f"{len(values):,} of the literature's {ROWS:,} rows: for tests alone, not a result"
    return Table("miniboone", 43, standardise(split_rows(values)), str(file), note)
