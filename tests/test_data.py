"""IndexedDataset."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from ntdne_kernels import IndexedDataset


def test_samples_end_with_their_index_whatever_the_sampler_does():
    images, labels = torch.arange(10.0).unsqueeze(1), torch.arange(10) % 3
    dataset = IndexedDataset(TensorDataset(images, labels))
    for batch, (image, label, index) in enumerate(DataLoader(dataset, batch_size=4, shuffle=True)):
        assert batch < 3
        assert torch.equal(image[:, 0], index.float())
        assert torch.equal(label, index % 3)


def test_index_counts_in_the_wrapped_dataset():
    subset = IndexedDataset(Subset(TensorDataset(torch.arange(10)), [7, 8]))
    assert [(int(value), index) for value, index in subset] == [(7, 0), (8, 1)]
    assert subset[-1][1] == 1
    assert len(subset) == 2


def test_a_sample_that_is_no_tuple_is_paired_with_its_index():
    assert IndexedDataset(["a", "b"])[1] == ("b", 1)


def test_positions_outside_raise():
    with pytest.raises(IndexError, match="index: expected a position below 2, got 2"):
        IndexedDataset(["a", "b"])[2]


def test_a_dataset_without_positions_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    for dataset in (Stream(), iter(())):
        with pytest.raises(TypeError, match="dataset: expected a map-style dataset"):
            IndexedDataset(dataset)
