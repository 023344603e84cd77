"""GAS: readings of chemical sensors in mixtures of ethylene and carbon monoxide, D = 8.

Steps, as in the code of the MAF paper (`datasets/gas.py`):

1. of the 19 columns the time and the two concentrations are left out;
2. a sensor whose correlation with another exceeds 0.98 is left out, the first such sensor first;
3. rows are standardised by mean and std of all of them;
4. the splits are those of `split_rows`.

The authors' rows are a random quarter of the UCI archive's text. From that text a seeded quarter
is taken, in the order of the file.
"""

from __future__ import annotations

import numpy as np

from pipeline.errors import UserError
from pipeline.tabular.table import (
    Array,
    ArrayRows,
    Table,
    check_values,
    find_file,
    read_npy,
    read_text,
    require_variation,
    split_rows,
)

NAMES = ("gas/ethylene_CO.npy", "ethylene_CO.txt", "gas/ethylene_CO.pickle")
#: rows of the literature's experiments
ROWS = 1_052_065
_COLUMNS = 19
_CORRELATED = 0.98


def load_gas(path: str | None) -> Table:
    """Load GAS from `data.path`.

    Raises:
        UserError: the path is null, or the file is missing, damaged, a pickle, or of another
            width, or a sensor is constant.
    """
    file = find_file(path, NAMES, "GAS")
    if file.suffix == ".pickle":
        raise UserError(
            f"{file} is a pickle, which may run code; expected ethylene_CO.npy next to it; "
            "convert it by pandas.read_pickle and numpy.save, as docs/bench.md shows"
        )
    if file.suffix == ".npy":
        values = check_values(read_npy(file), _COLUMNS, file)
        note = "the literature's rows and split" if len(values) == ROWS else _note(len(values))
    else:
        values = check_values(read_text(file, None, 1, tuple(range(_COLUMNS))), _COLUMNS, file)
        kept = np.sort(np.random.RandomState(42).permutation(len(values))[: len(values) // 4])
        values = values[kept]
        note = _note(len(values))
    values = preprocess(values)
    rows = {name: ArrayRows(part) for name, part in split_rows(values).items()}
    return Table("gas", values.shape[1], rows, str(file), note)


def preprocess(values: Array) -> Array:
    """Leave out columns and standardise rows (n, 19), as steps 1 to 3 say: (n, D).

    Raises:
        UserError: a sensor is constant.
    """
    values = values[:, 3:]
    require_variation(values)
    while True:
        high = np.atleast_2d(np.corrcoef(values, rowvar=False)) > _CORRELATED
        several = np.nonzero(high.sum(axis=1) > 1)[0]
        if not len(several):
            break
        values = np.delete(values, several[0], axis=1)
    return (values - values.mean(axis=0)) / values.std(axis=0, ddof=1)


def _note(count: int) -> str:
    return (
        f"{count:,} rows, {ROWS:,} in the literature, which are another random quarter; the "
        "split is not the literature's to the row"
    )
