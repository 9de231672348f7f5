"""CUDA graphs: what cannot be captured says so, where CUDA would give a number of an error, or nothing."""

import torch


def check_not_capturing(device: torch.device, why: str) -> None:
    """RuntimeError that says why, if work for the device is being captured into a CUDA graph."""
    on_gpu = device.type == "cuda" and torch.cuda.is_initialized()  # else the tensors are fake ones
    if on_gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"CUDA graph: {why}; examples/cuda_graph.py shows a capture")
