"""Markdown tables of a benchmark run: python -m benchmarks.table benchmarks/results/cpu.json"""

import json
import sys
from pathlib import Path
from typing import Any


def main(path: str) -> None:
    run = json.loads(Path(path).read_text())
    info = run["machine_info"]
    cpu = f"{info['cpu'].get('brand_raw', 'CPU')}, {info['cpu']['count']} cores, {info['vector_instructions']}"
    print(f"{cpu}; torch {info['torch']}; {run['datetime'][:10]}. Medians.\n")
    benchmarks = run["benchmarks"]
    rate = {
        b["extra_info"]["dtype"]: b["extra_info"]["operations"] / b["stats"]["median"]
        for b in benchmarks
        if b["group"] == "machine"
    }
    for dtype, value in rate.items():
        print(f"Matrix product, {dtype}: {value / 1e9:.0f} GFLOP/s.")
    groups: dict[str, list[dict[str, Any]]] = {}
    for benchmark in benchmarks:
        groups.setdefault(benchmark["group"], []).append(benchmark)
    groups.pop("machine")
    for group, members in groups.items():
        print(f"\n**{group}**\n")
        print_group(members, rate)


def print_group(members: list[dict[str, Any]], rate: dict[str, float]) -> None:
    """One row a benchmark, with the columns this group has; the first is what the others are compared with."""
    first = members[0]["stats"]["median"]
    rows = []
    for member in members:
        extra, median = member["extra_info"], member["stats"]["median"]
        row = {"": next(str(extra[key]) for key in ("loss", "update", "classes", "rows") if key in extra)}
        row["median"] = f"{median:.3f} s" if median > 0.001 else f"{median * 1e6:.1f} µs"
        if "loss" in extra or "update" in extra:
            row[f"against {members[0]['extra_info'].get('loss', 'pytorch')}"] = f"{first / median:.1f} × as fast"
        if "operations" in extra:
            row["share of the floor"] = f"{extra['operations'] / rate[extra['dtype']] / median:.0%}"
        if "peak_bytes" in extra:
            row["added memory"] = f"{extra['peak_bytes'] / 2**20:.0f} MB"
        rows.append(row)
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
