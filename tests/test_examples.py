"""The examples run as a user runs them."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ntdne_kernels.experiments import load_encoder

ROOT = Path(__file__).parent.parent


# As examples/train_distributed.py says.
ENVIRONMENT = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


def load_example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_here(tmp_path):
    """Runs an example in a folder of its own, which must succeed; the archive that it makes is there too."""

    def run(name: str, *arguments: str) -> str:
        command = [sys.executable, str(ROOT / "examples" / name), *arguments]
        environment = ENVIRONMENT | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def suspects(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def planted(rows: list[dict[str, str]]) -> int:
    """How many images `make_scenes` has put into a wrong folder."""
    return sum("wrong-" in row["path"] for row in rows)


def test_audit_folder_ranks_wrong_labels_first(run_here, tmp_path, monkeypatch):
    from torchvision.models import resnet18

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    archive = load_example("_scenes").make_scenes(per_class=12)
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), tmp_path / "weights.pt")
    printed = run_here("audit_folder.py", str(archive), "--weights", "weights.pt", "--workers", "0", "--show", "7")
    rows = suspects(tmp_path / "suspects.csv")
    assert len(rows) == 60
    assert planted(rows[:10]) >= 8
    assert all(row["predicted_label"] == Path(row["path"]).name.split("-")[1] for row in rows[:5])
    assert printed.count(" -> ") == 1 + 7


def test_frozen_features_finds_the_wrong_labels_of_digits(run_here, tmp_path):
    from sklearn.datasets import load_digits

    printed = run_here("frozen_features.py", "--epochs", "10")
    assert float(printed.split("about ")[1].split("%")[0]) == pytest.approx(30, abs=3)
    rows = suspects(tmp_path / "runs" / "head" / "suspects.csv")
    true = load_digits().target
    assert np.mean([int(row["given_label"]) != true[int(row["image"])] for row in rows[:450]]) > 0.95


def test_frozen_features_reads_files_with_names_as_labels(run_here, tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    np.save(tmp_path / "features.npy", digits.data[:200])
    np.save(tmp_path / "labels.npy", [("zero", "one")[digit % 2] for digit in digits.target[:200]])
    run_here("frozen_features.py", "features.npy", "labels.npy", "out", "--epochs", "1")
    assert np.load(tmp_path / "out" / "embeddings.npy").shape == (200, 128)
    assert torch.load(tmp_path / "out" / "head.pt")["0.weight"].shape == (512, 64)
    assert {row["given_label"] for row in suspects(tmp_path / "out" / "suspects.csv")} == {"zero", "one"}


def test_a_killed_disk_bank_run_gives_what_a_whole_one_gives(run_here, tmp_path):
    options = ["--epochs", "2", "--image-size", "32", "--workers", "0"]
    expected = run_here("disk_bank.py", "whole", *options).splitlines()
    archive = next(tmp_path.glob("scenes-*"))
    command = [sys.executable, str(ROOT / "examples" / "disk_bank.py"), "killed", str(archive), *options]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().rstrip() == expected[1]
    process.kill()  # in the second epoch
    process.communicate()
    assert run_here("disk_bank.py", "killed", str(archive), *options).splitlines() == expected[2:]


def test_aerial_goes_from_a_folder_to_features_audit_head_and_search(run_here, tmp_path, monkeypatch):
    from torchvision.models import resnet18

    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), tmp_path / "weights.pt")
    network = ("--encoder", "resnet18", "--weights", "weights.pt", "--image-size", "32")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    archive = load_example("_scenes").make_scenes(per_class=12)
    printed = run_here("aerial.py", str(archive), "out", *network, "--epochs", "2")
    assert printed.count("$ ntdne ") == 4
    assert np.load(tmp_path / "out/features/features.npy").shape == (60, 512)
    rows = sorted(suspects(tmp_path / "out/audit/audit.csv"), key=lambda row: int(row["rank"]))
    assert planted(rows[:10]) >= 8
    assert load_encoder(tmp_path / "out/head")(torch.zeros(1, 512)).shape == (1, 128)
    assert "data:image" in (tmp_path / "out/search.html").read_text()


def test_aerial_archive_trains_and_ranks_wrong_labels_first(run_here, tmp_path):
    printed = run_here(
        "aerial_archive.py", "--epochs", "5", "--batch-size", "32", "--image-size", "32", "--workers", "0"
    )
    assert printed.count("median score") == 5
    output = tmp_path / "runs" / "aerial"
    assert planted(suspects(output / "suspects.csv")[:25]) >= 20
    assert torch.load(output / "encoder.pt")["fc.weight"].shape == (128, 512)


def torchrun(processes: int, *arguments: str) -> subprocess.Popen[str]:
    """Standard error goes to a file beside the checkpoints: nobody reads it while the processes run."""
    launcher = f"-m torch.distributed.run --standalone --max-restarts 1 --nproc-per-node {processes}".split()
    return subprocess.Popen(
        [sys.executable, *launcher, "examples/train_distributed.py", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=Path(f"{arguments[0]}.stderr").open("w"),
        text=True,
    )


def test_drop_in_learns_the_digits():
    result = run("examples/drop_in.py")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split("test accuracy ")[1].rstrip("%\n")) > 95


def test_cuda_graph_trains_without_a_gpu_too():
    result = run("-c", "import examples.cuda_graph as recipe; recipe.main(2)")
    assert result.returncode == 0, result.stderr
    assert [line.split("loss")[0] for line in result.stdout.splitlines()[:-1]] == ["epoch  1  ", "epoch  2  "]
    assert float(result.stdout.split("mean score ")[1]) > 0.5


def test_train_distributed_gives_the_same_after_a_killed_process(tmp_path):
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    expected = torchrun(2, whole, "--epochs", "4").communicate(timeout=300)[0].splitlines()
    assert [line.split("loss")[0] for line in expected[:-1]] == [f"epoch {epoch:2}  " for epoch in (1, 2, 3, 4)]
    assert expected[-1].startswith("test accuracy")

    process = torchrun(2, killed, "--epochs", "4")
    seen = []
    for line in process.stdout:
        seen.append(line.rstrip())
        if seen == expected[:2]:  # the third epoch has begun
            children = Path(f"/proc/{process.pid}/task").glob("*/children")
            workers = [int(pid) for of_thread in children for pid in of_thread.read_text().split()]
            os.kill(max(workers), signal.SIGKILL)
    assert process.wait(timeout=300) == 0, Path(f"{killed}.stderr").read_text()
    assert "Signal 9" in Path(f"{killed}.stderr").read_text() or "exitcode: -9" in Path(f"{killed}.stderr").read_text()
    assert seen == expected  # also the loss of each epoch, and the accuracy
    # Four epochs are done: the same folder on one process gives the result alone.
    assert torchrun(1, killed, "--epochs", "4").communicate(timeout=300)[0].splitlines() == expected[-1:]


def test_digits_writes_its_figures_and_results(tmp_path):
    result = run("examples/digits.py", "--epochs", "1", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"features.png", "scores.png", "results.json"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["metrics"]) == ["cross-entropy", "SNCA", "NTDNE"]
    for cost in results["costs"]:
        assert cost["streamed_peak_megabytes"] < 64
        assert cost["gradient_difference"] < 1e-4
    assert "\x1b" not in result.stdout
    from ntdne_kernels.experiments.arguments import parser

    commands = [line.split("  ")[1].split() for line in result.stdout.splitlines() if line.startswith("  ntdne ")]
    assert [parser().parse_args(command[1:]).command for command in commands] == ["embed", "audit", "train", "search"]


@pytest.mark.parametrize(
    "arguments", [("--noise", "2"), ("--epochs", "none"), ("--seed", "-1"), ("--output", "/dev/null")]
)
def test_digits_names_a_bad_argument_in_one_line(arguments):
    result = run("examples/digits.py", *arguments)
    assert result.returncode == 2
    assert arguments[0] in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_lightning_module_goes_on_bit_for_bit_from_a_checkpoint(tmp_path):
    lightning = pytest.importorskip("lightning")
    recipe = load_example("lightning_module")
    data = recipe.digits()
    loader = DataLoader(data, batch_size=256)

    def fit(epochs: int, seed: int, checkpoint: Path | None = None) -> Any:
        torch.manual_seed(seed)  # of weights and rows, which a checkpoint brings along
        module = recipe.NeighbourhoodModule(recipe.make_encoder(), data.labels)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(max_epochs=epochs, default_root_dir=tmp_path, accelerator="cpu", **quiet)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    whole = fit(7, seed=0)
    fit(6, seed=0)
    resumed = fit(7, seed=1, checkpoint=tmp_path / "6.ckpt")
    assert resumed.criterion.epoch == 6
    assert resumed.criterion.pruning
    expected = whole.state_dict()
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_the_lightning_script_takes_up_its_last_checkpoint(tmp_path):
    script = f"import examples.lightning_module as recipe, pathlib; recipe.main(pathlib.Path({str(tmp_path)!r}), %d)"
    for epochs in (2, 3):
        result = run("-c", script % epochs)
        assert result.returncode == 0, result.stderr
        assert f"after epoch {epochs}" in result.stdout
    assert "Restored all states from the checkpoint" in result.stderr + result.stdout


def test_the_lightning_module_s_checkpoint_has_the_bank_of_all_processes(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys; from pathlib import Path; sys.path.insert(0, {str(ROOT)!r})\n"
        "from examples.lightning_module import main\n"
        "main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))\n"
    )
    folder = tmp_path / "run"
    for epochs, devices in ((1, 2), (2, 2), (3, 1)):  # goes on with as many processes, and with another number
        result = run(str(script), str(folder), str(epochs), str(devices))
        assert result.returncode == 0, result.stderr
        assert f"after epoch {epochs}" in result.stdout
        state = torch.load(folder / "last.ckpt", weights_only=False)["state_dict"]
        assert state["criterion.memory.storage"].shape == (1797, 64)
        assert not bool(state["criterion.memory.scores"].isnan().any())
