"""The tabular data sets by name."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.config.data import TABLES, DataConfig
from pipeline.errors import UserError
from pipeline.tabular.bsds300 import load_bsds300
from pipeline.tabular.gas import load_gas
from pipeline.tabular.miniboone import load_miniboone
from pipeline.tabular.power import load_power
from pipeline.tabular.table import Table

LOADERS: dict[str, Callable[[str | None], Table]] = {
    "power": load_power,
    "gas": load_gas,
    "miniboone": load_miniboone,
    "bsds300": load_bsds300,
}
assert tuple(LOADERS) == TABLES


def load_table(data: DataConfig) -> Table:
    """Load a tabular data set.

    Args:
        data: name and path.

    Raises:
        UserError: the name is unknown, or the file is missing, damaged or of another width.
        JkoflowError: a package could not be fetched.
    """
    if data.name not in LOADERS:
        raise UserError(f"table {data.name!r} is unknown; choose one of {', '.join(TABLES)}")
    return LOADERS[data.name](data.path)
