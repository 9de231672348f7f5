"""`ntdne search`: the images of an archive nearest to new ones, and the page that shows them."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from ntdne_kernels.experiments import embed, retrieval, search
from ntdne_kernels.experiments.encoders import make_encoder
from tests.experiments.auditing.helpers import pictures_on


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, resnet18_file):
    """Pictures of two classes and one beside them, and the folder of their features."""
    root, source = tmp_path_factory.mktemp("searched"), np.random.default_rng(0)
    for name in ("beside.png", *(f"{c}/{i}.png" for c in ("bright", "dark") for i in range(5))):
        (root / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(root / "photos" / name)
    embed(root / "photos", "resnet18", root / "out", weights=resnet18_file, image_size=32, device="cpu")
    return root


def test_search_equals_plain_similarities_block_by_block(monkeypatch):
    archive, queries = torch.randn(50, 6).half(), torch.randn(7, 6)
    expected = (normalize(queries, dim=1) @ normalize(archive.float(), dim=1).t()).topk(4)
    monkeypatch.setattr(retrieval, "rows_per_block", lambda values: 8)
    for form in (archive, archive.numpy()):
        neighbours, similarity = search(form, queries, 4, device="cpu")
        assert torch.equal(neighbours, expected.indices)
        assert torch.allclose(similarity, expected.values, atol=1e-6)


def test_fewer_images_than_k_are_all_given():
    assert search(torch.eye(3), torch.eye(3)[:1], 10)[0].shape == (1, 3)


def test_a_head_is_put_on_archive_and_queries():
    archive = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    swapped = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.eye_(swapped.weight)
    swapped.weight.data[0] = 0  # only the second value counts
    archive[:, 1] += torch.tensor([0.5, -2.0])
    neighbours, similarity = search(archive, torch.tensor([[-9.0, -1.0]]), 2, head=swapped)
    assert neighbours.tolist() == [[1, 0]]
    assert similarity.tolist() == [[1.0, -1.0]]


def test_a_copy_of_an_image_is_found_first(embedded, tmp_path):
    shutil.copy(embedded / "photos" / "dark" / "3.png", tmp_path / "new.png")
    files = (embedded / "out" / "files.txt").read_text().splitlines()
    neighbours, similarity = search(embedded / "out", [tmp_path / "new.png"], 3)
    assert files[int(neighbours[0, 0])] == "dark/3.png"
    assert similarity[0, 0] == pytest.approx(1, abs=1e-5)
    assert similarity[0, 1] < similarity[0, 0]


def test_the_command_prints_a_table_and_the_page_has_its_pictures(ntdne, embedded, capsys):
    queries = [embedded / "photos" / "bright" / "1.png", embedded / "photos" / "beside.png"]
    assert ntdne("search", embedded / "out", *queries, "--k", 4, "--page", "sheet.html") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [str(queries[0]), " rank  similarity  class   file"]
    assert re.fullmatch(r"    1      1\.0000  bright  bright/1\.png", lines[2])
    assert lines[-1] == "sheet.html"
    beside = lines[lines.index(str(queries[1])) + 2]
    assert beside.split() == ["1", "1.0000", "beside.png"]
    page = Path("sheet.html")
    pictures = pictures_on(page)
    assert len(pictures) == 2 * (1 + 4)
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    assert "bright/1.png" in page.read_text()
    assert "None of the pictures" not in page.read_text()


def test_plain_features_are_searched_by_features(ntdne, capsys, tmp_path):
    np.save(tmp_path / "features.npy", np.eye(4, dtype=np.float16))
    np.save(tmp_path / "new.npy", np.eye(4, dtype=np.float32)[[2]])
    page = tmp_path / "sheet.html"
    assert ntdne("search", tmp_path / "features.npy", tmp_path / "new.npy", "--k", 1, "--page", page) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == ["1", "1.0000", "row", "2"]
    assert "None of the pictures could be opened" in page.read_text()


@pytest.mark.parametrize(
    ("archive", "queries", "message"),
    [
        (torch.eye(3), torch.eye(4), "queries: expected 3 features, as the archive has, got 4"),
        (torch.eye(3), torch.ones(3), "queries: expected features"),
        (torch.eye(3), torch.zeros(2, 3), "queries: expected rows of a positive, finite norm, got another in row 0"),
        (torch.tensor([[1.0], [np.nan]]), torch.ones(1, 1), "archive: expected rows .* got another in row 1"),
        (torch.eye(3), ["new.jpg"], "image files need a folder of ntdne embed"),
    ],
)
def test_what_cannot_be_compared_is_refused(archive, queries, message):
    with pytest.raises(ValueError, match=message):
        search(archive, queries, 2, device="cpu")


@pytest.mark.parametrize("k", [0, True, 1.0])
def test_k_is_a_count(k):
    with pytest.raises(ValueError, match="k: expected 1 or more"):
        search(torch.eye(3), torch.eye(3), k)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "broken.png"], "broken.png cannot be read: not an image"),
        (["out", "nowhere.png"], "nowhere.png cannot be read: No such file or directory"),
        (["photos", "photos/beside.png"], "expected a folder of ntdne embed"),
        (["out", "photos/beside.png", "--page", "nowhere/sheet.html"], "--page: expected a file in a folder"),
        (["nowhere.npy", "photos/beside.png"], "No such file or directory"),
        (["nowhere", "photos/beside.png"], "No such file or directory"),
        (["out", "photos/beside.png", "--page", "."], "--page: expected a file in a folder"),
    ],
)
def test_wrong_commands_are_said_in_one_line(ntdne, embedded, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(embedded)
    (embedded / "broken.png").write_text("no image")
    assert ntdne("search", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_other_weights_than_those_of_the_archive_are_refused(embedded, tmp_path, resnet18_file):
    shutil.copytree(embedded / "out", tmp_path / "out")
    state = torch.load(resnet18_file)
    state["conv1.weight"] += 1
    torch.save(state, tmp_path / "other.pth")
    about = (tmp_path / "out" / "embed.json").read_text()
    (tmp_path / "out" / "embed.json").write_text(about.replace(resnet18_file, str(tmp_path / "other.pth")))
    with pytest.raises(ValueError, match="is not what made its features"):
        search(tmp_path / "out", [embedded / "photos" / "beside.png"], 1)


def trained_head(image_size: int | None) -> None:
    """Write encoder.pt of a linear head that keeps the second of two values alone."""
    weight = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    parts = {"name": "linear", "dim": 2, "classes": [], "image_size": image_size, "bands": ()}
    normalisation = {"mean": (0.0, 0.0), "deviation": (1.0, 1.0), "floats": True}
    state = make_encoder("linear", 2, bands=2).state_dict()
    for key, value in state.items():
        state[key] = weight if value.dim() == 2 else torch.zeros_like(value)
    torch.save({"format": 1, "normalisation": normalisation, "state_dict": state, **parts}, "encoder.pt")


def test_the_command_compares_what_a_trained_head_makes_of_features(ntdne, capsys):
    np.save("archive.npy", np.array([[1.0, -1.0], [0.0, 1.0]], np.float32))
    np.save("queries.npy", np.array([[9.0, 1.0]], np.float32))
    trained_head(None)
    for options, nearest in (((), "row 0"), (("--checkpoint", "encoder.pt"), "row 1")):
        assert ntdne("search", "archive.npy", "queries.npy", *options) == 0
        assert capsys.readouterr().out.splitlines()[2].endswith(nearest)


def test_search_refuses_the_encoder_of_a_run_on_images(ntdne, capsys):
    np.save("archive.npy", np.eye(2, dtype=np.float32))
    trained_head(8)
    assert ntdne("search", "archive.npy", "archive.npy", "--checkpoint", "encoder.pt") == 2
    assert "--checkpoint: expected a run on features" in capsys.readouterr().err
