"""Training: continued runs, checkpoints, logs, several processes, and the presets."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ntdne_kernels.experiments.problem import make_problem
from ntdne_kernels.experiments.settings import Settings, read_preset
from ntdne_kernels.experiments.training import Batches, Training, WholeCheckpoints, make_criterion, train
from tests.experiments.helpers import QUICK

COMMAND = [sys.executable, "-m", "ntdne_kernels.experiments.cli", "train", "made:400x5", *QUICK, "--accelerator", "cpu"]


def checkpoint_of(folder: Path) -> dict:
    return torch.load(folder / "last.ckpt", weights_only=True)


def history_of(checkpoint: dict) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in checkpoint["history"]]


def kill_after_epoch(command: list[object], folder: Path, epoch: int, environment: dict[str, str]) -> None:
    """Start a command and kill it once its checkpoint holds an epoch, counted from 1: in the middle of the next one."""
    with subprocess.Popen([*map(str, command)], env=environment) as process:
        while process.poll() is None:
            if (folder / "last.ckpt").exists() and len(checkpoint_of(folder)["history"]) >= epoch:
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.01)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "options",
    [
        ["--loss-option", "k=auto", "--loss-option", "warmup_epochs=2", "--augment"],
        ["--loss", "t-RNSL", "--loss-option", "warmup_epochs=2", "--augment", "--workers", "1", "--schedule", "step"],
    ],
    ids=["NTDNE", "t-RNSL, a worker"],
)
def test_a_run_killed_in_an_epoch_continues_as_if_it_never_was(tmp_path, options):
    """Encoder, bank, scores, optimiser, schedule and history: bit for bit."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [*COMMAND, *options, "--epochs", "5", "--image-size", "16"]
    subprocess.run([*command, "--output", tmp_path / "whole"], check=True, env=environment)
    kill_after_epoch([*command, "--output", tmp_path / "killed"], tmp_path / "killed", 2, environment)
    assert 2 <= len(checkpoint_of(tmp_path / "killed")["history"]) < 5
    assert not (tmp_path / "killed" / "results.json").exists()
    subprocess.run([*command, "--output", tmp_path / "killed"], check=True, env=environment)

    whole, killed = (checkpoint_of(tmp_path / name) for name in ("whole", "killed"))
    assert history_of(killed) == history_of(whole)
    assert killed["state_dict"].keys() == whole["state_dict"].keys()
    assert killed["lr_schedulers"] == whole["lr_schedulers"]
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(killed[part], whole[part], rtol=0, atol=0, equal_nan=True)


def small_settings(**changes: object) -> Settings:
    values = {"data": "made:120x3", "image_size": 8, "encoder": "small", "dim": 8, "epochs": 2, "batch_size": 32}
    return Settings(**values | {"augment": False, "loss_options": {"warmup_epochs": 1}} | changes)


def test_logs_hold_loss_pruned_share_score_quantiles_and_validation(tmp_path):
    settings = small_settings()
    train(settings, make_problem(settings, tmp_path / "cache"), tmp_path / "run", accelerator="cpu")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    tags = events.Tags()["scalars"]
    for name in ("loss", "pruned_share", "p10", "p50", "p90", "val_knn", "val_knn_given", "flip_auroc", "lr"):
        assert name in tags
        assert len(events.Scalars(name)) == 2


def test_what_is_logged_is_true(tmp_path):
    settings = small_settings(loss_options={"warmup_epochs": 1, "k": 0.35})
    problem = make_problem(settings, tmp_path / "cache")
    trained = train(settings, problem, tmp_path / "run", accelerator="cpu")
    p = trained.criterion.memory.last_log_p.exp()
    row = trained.history[-1]
    assert row["pruned_share"] == pytest.approx(float((p <= 0.35).float().mean()))
    assert trained.history[0]["pruned_share"] == 0  # the warm-up
    assert row["p50"] == pytest.approx(float(p.quantile(0.5)))
    unit = trained.train_features
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(len(unit)))


def test_the_bank_is_updated_after_each_step_with_what_the_encoder_gave(tmp_path):
    settings = small_settings(epochs=1, loss_options={"momentum": 0.0})
    trained = train(settings, make_problem(settings, tmp_path / "cache"), tmp_path / "run", accelerator="cpu")
    rows = trained.criterion.memory.rows(torch.arange(len(trained.train_features)))
    torch.testing.assert_close(rows, trained.train_features)


def test_the_momentum_of_the_bank_follows_its_epochs(tmp_path):
    settings = small_settings(epochs=3, loss="SNCA", loss_options={"momentum": {0: 0.5, 2: 0.9}})
    seen = []

    class Watched(Training):
        def on_train_batch_end(self, *arguments: object) -> None:
            seen.append((self.current_epoch, self.criterion.momentum))
            super().on_train_batch_end(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ntdne_kernels.experiments.training.Training", Watched)
        train(settings, make_problem(settings, tmp_path / "cache"), tmp_path / "run", accelerator="cpu")
    assert set(seen) == {(0, 0.5), (1, 0.5), (2, 0.9)}


def test_a_step_schedule_halves_the_learning_rate(tmp_path):
    settings = small_settings(epochs=4, lr=0.08, lr_step=2, loss="NSL", loss_options={})
    trained = train(settings, make_problem(settings, tmp_path / "cache"), tmp_path / "run", accelerator="cpu")
    assert [row["lr"] for row in trained.history] == pytest.approx([0.08, 0.08, 0.04, 0.04])


def test_a_checkpoint_whose_writing_fails_leaves_the_one_before(tmp_path):
    path = tmp_path / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"epoch": 1}, path)

    class Breaks:
        def __reduce__(self) -> None:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        WholeCheckpoints().save_checkpoint({"epoch": 2, "much": torch.zeros(1000), "then": Breaks()}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}


def test_a_class_with_a_single_given_label_is_no_obstacle(tmp_path):
    """Its score is 0, and log p −∞."""
    settings = small_settings(data="made:12x4", epochs=1)
    problem = make_problem(settings, tmp_path / "cache")
    problem.noisy.labels.copy_(torch.tensor([0, 1, 1, 1, 2, 2, 3, 3]))
    problem.noisy.flipped.copy_(problem.noisy.labels != problem.labels[problem.train])
    trained = train(settings, problem, tmp_path / "run", accelerator="cpu")
    assert trained.criterion.memory.last_log_p[0] == -torch.inf
    assert trained.history[0]["p10"] >= 0


def test_a_last_batch_of_one_image_joins_the_one_before():
    def batches(n: int, B: int) -> list[int]:
        found = list(Batches(range(n), B))
        assert len(found) == len(Batches(range(n), B))
        assert [i for batch in found for i in batch] == list(range(n))
        return [len(batch) for batch in found]

    assert batches(9, 4) == [4, 5]
    assert batches(10, 4) == [4, 4, 2]
    assert batches(8, 4) == [4, 4]
    assert batches(3, 4) == [3]
    assert batches(1, 4) == [1]
    assert batches(3, 1) == [1, 1, 1]


def test_samples_do_not_depend_on_who_makes_them(tmp_path):
    problem = make_problem(small_settings(), tmp_path / "cache")
    images = problem.train[:8]
    first, again = problem.dataset(images, augment_by=5), problem.dataset(images, augment_by=5)
    forwards = [first[i][0] for i in range(8)]
    backwards = [again[i][0] for i in reversed(range(8))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    others = problem.dataset(images, augment_by=6)
    assert not any(torch.equal(a, others[i][0]) for i, a in enumerate(forwards))


def test_a_run_is_not_continued_on_other_images_or_labels(tmp_path):
    settings = small_settings()
    train(settings, make_problem(settings, tmp_path / "cache"), tmp_path / "run", accelerator="cpu")
    other = make_problem(small_settings(rate=0.3), tmp_path / "cache")
    with pytest.raises(ValueError, match="had other images or given labels"):
        train(settings, other, tmp_path / "run", accelerator="cpu")


@pytest.mark.parametrize(("loss", "said"), [("MAE", "training diverged; try"), ("NTDNE", "diverged in epoch 1; try")])
def test_a_diverged_run_says_so(tmp_path, loss, said):
    settings = small_settings(lr=1e30, loss=loss, loss_options={})
    with pytest.raises(ValueError, match=f"{said} a lower --lr"):
        train(settings, make_problem(settings, tmp_path / "cache"), tmp_path / "run", accelerator="cpu")


def test_truncating_nearly_everything_is_logged_and_warned_of(tmp_path):
    settings = small_settings(loss="t-RNSL", loss_options={"k": 0.99, "sigma": 1, "warmup_epochs": 0})
    with pytest.warns(UserWarning, match="100 % of the images had p of at most k = 0.99 in epoch 0"):
        trained = train(settings, make_problem(settings, tmp_path / "cache"), tmp_path / "run", accelerator="cpu")
    assert [row["pruned_share"] for row in trained.history] == [1, 1]


@pytest.mark.parametrize("momentum", [{1: 0.5}, {0: 2.0}, {0: 0.5, "late": 0.9}, {0: "half"}])
def test_bad_schedules_of_the_momentum_are_refused(momentum):
    with pytest.raises(ValueError, match="momentum: expected {0: number in"):
        make_criterion(small_settings(loss_options={"momentum": momentum}), torch.tensor([0, 1]))


def test_two_processes_keep_the_same_bank(tmp_path):
    """Each updates its bank with the features of both."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    script = tmp_path / "watch.py"
    script.write_text(
        "import os, sys, torch\n"
        "from ntdne_kernels.experiments import cli, training\n"
        "class Watched(training.Training):\n"
        "    def on_train_end(self):\n"
        "        memory = self.criterion.memory\n"
        "        torch.save((memory.storage, memory.last_log_p), f'{sys.argv[1]}/bank-{self.global_rank}.pt')\n"
        "training.Training = Watched\n"
        "sys.exit(cli.main(sys.argv[2:]))\n"
    )
    arguments = ["train", "made:120x3", *QUICK, "--accelerator", "cpu", "--devices", "2", "--output", tmp_path / "run"]
    subprocess.run([sys.executable, script, tmp_path, *arguments], check=True, env=environment)
    (rows, _), (others, _) = (torch.load(tmp_path / f"bank-{rank}.pt") for rank in (0, 1))
    assert torch.equal(rows, others)
    assert len(checkpoint_of(tmp_path / "run")["history"]) == 2
    assert (tmp_path / "run" / "results.json").exists()


def test_the_paper_preset_is_the_paper():
    preset = read_preset("paper")
    expected = {"image_size": 256, "encoder": "resnet18", "dim": 128, "epochs": 100, "batch_size": 256, "lr": 0.01}
    expected |= {"schedule": "step", "lr_step": 30, "lr_decay": 0.5}
    assert {name: preset[name] for name in expected} == expected
    paper = {"sigma": 0.1, "q": 0.7, "k": 0.3, "warmup_epochs": 20, "unit_slope": False, "momentum": 0.5}
    assert preset["losses"]["NTDNE"] == paper
    assert "weights" not in preset


@pytest.mark.parametrize("name", ["paper", "authors", "scratch"])
def test_presets_are_settings(name):
    preset = read_preset(name)
    losses = preset.pop("losses")
    for loss, options in losses.items():
        assert Settings("digits", loss=loss, loss_options=options, **preset).loss == loss


def test_a_preset_with_a_setting_that_does_not_exist_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 3\nlearning_rate: 0.1\n")
    with pytest.raises(ValueError, match="has no use for learning_rate; settings are .*lr,"):
        read_preset(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("losses: [NTDNE]\n", "expected losses in .* as 'loss: {option: value}'"),
        ("losses: {NTDNE: 5}\n", "expected losses in .* as 'loss: {option: value}'"),
        ("losses: {NTDN: {k: 0.3}}\n", "did you mean 'NTDNE'"),
        ("classes: 3\n", "expected a list of classes in .*, got 3"),
        ("[1, 2]\n", "has no use for list"),
        ("epochs: [", "is not YAML"),
    ],
)
def test_presets_that_are_none_are_refused(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_preset(str(tmp_path / "mine.yaml"))
