"""Noise-tolerant deep neighbourhood embedding over a whole archive, exact and streamed."""

from importlib.metadata import version

from ntdne_kernels import functional
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.data import IndexedDataset
from ntdne_kernels.fill import fill_bank
from ntdne_kernels.label_index import LabelIndex
from ntdne_kernels.labels import encode_labels
from ntdne_kernels.loss import NTDNELoss, SNCALoss

__all__ = [
    "IndexedDataset",
    "LabelIndex",
    "MemoryBank",
    "NTDNELoss",
    "SNCALoss",
    "encode_labels",
    "fill_bank",
    "functional",
]
__version__ = version("ntdne_kernels")
