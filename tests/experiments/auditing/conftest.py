"""Files and a trained run to audit; figures are not drawn except in their own tests."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ntdne_kernels.experiments import run as runs
from ntdne_kernels.experiments.auditing import page
from ntdne_kernels.experiments.encoders import make_encoder
from tests.experiments.auditing.helpers import clusters


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time, and these tests do not look at figures."""
    for name in ("quality_histogram", "transition_map"):
        monkeypatch.setattr(page, name, lambda *rest: "data:drawn")


@pytest.fixture
def files(ntdne) -> Path:
    """features.npy with labels.npy, in the folder that the command runs in."""
    features, labels = clusters()
    np.save("features.npy", features)
    np.save("labels.npy", labels)
    return Path()


@pytest.fixture
def trained(ntdne) -> Path:
    """The folder of a run whose encoder has its first weights."""
    settings = runs.Settings("photos", image_size=8, encoder="small", dim=16, loss_options={"sigma": 0.2})
    runs._announce(settings, "", Path("run"))
    torch.manual_seed(0)
    encoder = {f"encoder.{name}": value for name, value in make_encoder("small", 16).state_dict().items()}
    torch.save({"state_dict": encoder, "history": []}, "run/last.ckpt")
    return Path("run")
