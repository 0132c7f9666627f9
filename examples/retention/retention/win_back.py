"""Lists the customers to win back; its work runs as tasks on the cluster.

    liftyard submit examples/retention:win-back -- customers.csv win_back.csv

Paths are meant from the folder that it is submitted in.
"""

import sys

import polars as pl

from cluster import session
from retention import lapsed

CHUNK = 10


def main() -> None:
    """Reads CUSTOMERS, a CSV of `customer` and `orders`, and writes the lapsed ones to OUT."""
    import ray

    customers, out = sys.argv[1:]
    table = pl.read_csv(customers)
    orders = table["orders"].to_list()
    with session.connect(address="auto"):
        chunks = [orders[start : start + CHUNK] for start in range(0, len(orders), CHUNK)]
        # A task imports the package on whichever node it runs.
        task = ray.remote(num_cpus=1)(lapsed)
        found = ray.get([task.remote(chunk) for chunk in chunks])
    chosen = table.filter(pl.Series([each for chunk in found for each in chunk]))
    chosen.write_csv(out)
    print(f"{len(chosen)} of {len(table)} customers: {out}")


if __name__ == "__main__":
    main()
