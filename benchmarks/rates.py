"""What measured rows amount to: operations and bytes per second, and the share of what the machine can do.

Shapes: B queries, N bank rows, D features.
"""

import pandas as pd

from benchmarks.contract import DTYPES
from benchmarks.grid import GRADIENT, LOSS, PRODUCTS, TRAFFIC
from benchmarks.rows import OK

OURS = ("triton", "streaming", "ours")
"""The first of these that ran is what a user gets."""
OPERATIONS = {LOSS: 2, GRADIENT: 4, PRODUCTS: 2}
"""For each query, row and feature: the loss with its gradient needs two products with the bank."""


def with_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with further columns: seconds, flops, bandwidth, and the machine's shares of each.

    `seconds` are those of the device's clock where there is one. The least time for a case is the larger of two: its
    operations at the rate of the machine's own matrix product in that arithmetic, or in float32 where that is faster,
    and one reading of the bank at the rate at which the machine copies or reads. `share` is that least time over the
    seconds. On a CPU without instructions for bfloat16 PyTorch's product in it takes 8 times as long as in float32.
    """
    rows = rows.copy()
    rows["seconds"] = rows.device_50.fillna(rows.wall_50)
    values = rows.B * rows.N * rows.D
    rows["flops"] = values * rows.what.map(OPERATIONS) / rows.seconds
    itemsize = rows.dtype.map({name: dtype.itemsize for name, dtype in DTYPES.items()})
    rows["bandwidth"] = rows.N * rows.D * itemsize / rows.seconds
    rows.loc[rows.provider == "copy", "bandwidth"] *= 2  # it also writes
    flops_of_machine = rows[rows.what == PRODUCTS].set_index("dtype").flops
    flops_of_machine = flops_of_machine.clip(lower=flops_of_machine.get("float32", 0))
    rows["flops_share"] = rows.flops / rows.dtype.map(flops_of_machine)
    rows["bandwidth_share"] = rows.bandwidth / rows[rows.what == TRAFFIC].bandwidth.max()
    is_loss = rows.what.isin((LOSS, GRADIENT))
    rows["share"] = rows[["flops_share", "bandwidth_share"]].max(axis=1, skipna=False).where(is_loss)
    return rows


def ours(rows: pd.DataFrame) -> pd.Series | None:
    """Of the rows of a case, what a user gets; None where none of ours ran."""
    ran = rows[rows.outcome == OK].set_index("provider")
    return next((ran.loc[name] for name in OURS if name in ran.index), None)
