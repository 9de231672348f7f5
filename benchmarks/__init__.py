"""Measurements: the loss against plain PyTorch, and the bank update against the same in PyTorch."""
