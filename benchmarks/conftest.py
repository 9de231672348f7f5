"""What pytest-benchmark writes about the machine and the times of `test_speed.py`."""

from typing import Any

import torch


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Leave out the machine's name, and add what the speed depends on."""
    del machine_info["node"]
    machine_info["torch"] = torch.__version__
    machine_info["vector_instructions"] = torch.backends.cpu.get_cpu_capability()


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keep the statistics, and not every single time."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
