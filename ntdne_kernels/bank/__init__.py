"""The memory bank: one unit row per image of an archive."""

from ntdne_kernels.bank.memory_bank import MemoryBank

__all__ = ["MemoryBank"]
