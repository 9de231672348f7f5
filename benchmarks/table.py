"""Markdown tables of a benchmark run: python -m benchmarks.table benchmarks/results/cpu.json"""

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any


def main(path: str) -> None:
    run = json.loads(Path(path).read_text())
    info = run["machine_info"]
    print(f"{info['cpu'].get('brand_raw', 'CPU')}, {info['cpu']['count']} cores, {run['datetime'][:10]}. Medians.\n")
    benchmarks = run["benchmarks"]
    rate = {
        b["extra_info"]["dtype"]: b["extra_info"]["operations"] / b["stats"]["median"]
        for b in benchmarks
        if b["group"] == "machine"
    }
    for dtype, value in rate.items():
        print(f"Matrix product, {dtype}: {value / 1e9:.0f} GFLOP/s.")
    for group, members in groupby((b for b in benchmarks if b["group"] != "machine"), key=lambda b: b["group"]):
        print(f"\n**{group}**\n")
        print_group(list(members), rate)


def print_group(members: list[dict[str, Any]], rate: dict[str, float]) -> None:
    """One row a benchmark; the first is what the others are compared with."""
    print("| | median | times the first | share of the floor | added memory |\n|---|---|---|---|---|")
    first = members[0]["stats"]["median"]
    for member in members:
        extra, median = member["extra_info"], member["stats"]["median"]
        name = next(str(extra[key]) for key in ("loss", "update", "classes", "rows") if key in extra)
        time = f"{median:.3f} s" if median > 0.01 else f"{median * 1e6:.1f} µs"
        floor = f"{extra['operations'] / rate[extra['dtype']] / median:.0%}" if "operations" in extra else ""
        memory = f"{extra['peak_bytes'] / 2**20:.0f} MB" if "peak_bytes" in extra else ""
        print(f"| {name} | {time} | {first / median:.1f} × as fast | {floor} | {memory} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
