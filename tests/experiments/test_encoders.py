"""Encoders: shapes, and first weights from files."""

import pytest
import torch

from ntdne_kernels.experiments.encoders import make_encoder


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "small"])
def test_features_have_dim_values(name):
    assert make_encoder(name, 7).eval()(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_weights_come_from_a_file(tmp_path):
    saved = make_encoder("small", 7)
    torch.save(saved.state_dict(), tmp_path / "weights.pt")
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(make_encoder("small", 7, str(tmp_path / "weights.pt")).eval()(images), saved.eval()(images))


def test_a_last_layer_of_another_width_stays_random(tmp_path):
    torch.save(make_encoder("small", 100).state_dict(), tmp_path / "weights.pt")
    loaded = make_encoder("small", 7, str(tmp_path / "weights.pt")).state_dict()
    saved = torch.load(tmp_path / "weights.pt")
    *others, weight, bias = saved
    assert all(torch.equal(loaded[name], saved[name]) for name in others)
    assert loaded[weight].shape[0] == loaded[bias].shape[0] == 7


@pytest.mark.parametrize(
    ("state", "message"),
    [({"fc.weight": torch.ones(3)}, "is no state dict of this network"), ([1, 2], "is no state dict of this network")],
)
def test_weights_of_another_network_are_refused(tmp_path, state, message):
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        make_encoder("small", 7, str(tmp_path / "weights.pt"))


def test_weights_that_cannot_be_read_come_with_no_advice_to_run_them(tmp_path):
    (tmp_path / "weights.pt").write_text("print('hello')")
    with pytest.raises(ValueError, match="holds no state dict that can be read") as error:
        make_encoder("small", 7, str(tmp_path / "weights.pt"))
    assert "weights_only" not in str(error.value)


def test_weights_of_other_shapes_are_refused(tmp_path):
    state = make_encoder("small", 7).state_dict()
    state["0.weight"] = torch.ones(5, 3, 3, 3)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="does not fit"):
        make_encoder("small", 7, str(tmp_path / "weights.pt"))


def test_small_has_no_imagenet_weights():
    with pytest.raises(ValueError, match="imagenet weights exist for resnet18 and resnet50"):
        make_encoder("small", 7, "imagenet")
