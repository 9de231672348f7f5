"""Encoders: shapes, and first weights from files."""

import pytest
import torch
from torchvision import models

from ntdne_kernels.experiments import encoders
from ntdne_kernels.experiments.encoders import make_encoder


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "small"])
def test_features_have_dim_values(name):
    assert make_encoder(name, 7).eval()(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "small"])
@pytest.mark.parametrize("bands", [1, 13])
def test_the_first_layer_is_made_for_any_number_of_bands(name, bands):
    assert make_encoder(name, 7, bands=bands).eval()(torch.randn(2, bands, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("bands", [1, 2, 4, 13])
def test_weights_for_colours_from_a_file_serve_other_bands(tmp_path, bands):
    saved = make_encoder("small", 7)
    torch.save(saved.state_dict(), tmp_path / "weights.pt")
    encoder = make_encoder("small", 7, str(tmp_path / "weights.pt"), bands=bands)
    first = saved.state_dict()["0.weight"]
    expected = [first[:, band % 3] * 3 / bands for band in range(bands)]
    assert torch.allclose(encoder.state_dict()["0.weight"], torch.stack(expected, dim=1))


def test_imagenet_weights_serve_other_bands_and_answer_repeated_colours_alike(monkeypatch):
    made = models.resnet18(weights=None)
    monkeypatch.setattr(encoders, "imagenet_weights", lambda name: made.state_dict())
    encoder = make_encoder("resnet18", 7, "imagenet", bands=6)
    assert torch.equal(encoder.conv1.weight, made.conv1.weight.repeat(1, 2, 1, 1) / 2)
    image = torch.randn(2, 3, 32, 32)
    assert torch.allclose(encoder.conv1(image.repeat(1, 2, 1, 1)), made.conv1(image), atol=1e-5)


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
