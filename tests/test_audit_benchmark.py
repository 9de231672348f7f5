"""The benchmark of the label audit: its measures, and that it runs on the folder of a trained run."""

import csv
import dataclasses

import pytest
import torch
import yaml

from benchmarks import audit
from ntdne_kernels.experiments.encoders import make_encoder
from ntdne_kernels.experiments.settings import Settings


def test_a_verdict_is_measured_against_the_labels_that_are_wrong():
    wrong = torch.tensor([True, False, True, False])
    suspects = torch.tensor([True, True, True, False])
    verdict = audit.Verdict(torch.tensor([0.1, 0.2, 0.3, 0.4]), {"rate": suspects}, 0.4)
    found = {(chosen, metric): value for chosen, metric, value in audit.measures(verdict, wrong)}
    assert found == {
        ("", "auroc"): 0.75,
        ("", "average_precision"): pytest.approx((1 + 2 / 3) / 2),
        ("", "precision_at_rate"): 0.5,
        ("", "noise_rate"): 0.4,
        ("", "true_rate"): 0.5,
        ("rate", "precision"): pytest.approx(2 / 3),
        ("rate", "recall"): 1.0,
    }


def test_evidence_of_a_run_is_written_and_drawn(tmp_path, capsys):
    settings = Settings("digits", image_size=16, rate=0.3, encoder="small", dim=16, epochs=1)
    run = tmp_path / "run"
    run.mkdir()
    values = dataclasses.asdict(settings) | {"classes": [], "variant": ""}
    (run / "settings.yaml").write_text(yaml.safe_dump(values))
    torch.manual_seed(0)
    encoder = {f"encoder.{name}": value for name, value in make_encoder("small", 16).state_dict().items()}
    torch.save({"state_dict": encoder, "history": [{}]}, run / "last.ckpt")
    file = tmp_path / "audit.csv"
    audit.write(audit.evidence(tmp_path, None), file)
    rows = list(csv.DictReader(file.open()))
    aurocs = {row["method"]: float(row["value"]) for row in rows if row["metric"] == "auroc"}
    assert aurocs.keys() == audit.METHODS.keys()
    assert min(aurocs.values()) > 0.5  # of an untrained encoder, whose images are all alike
    capsys.readouterr()
    audit.print_evidence(file)
    printed = capsys.readouterr().out
    assert f"{100 * aurocs['ours']:.1f}" in printed
    assert "| digits | uniform 0.3 | 27 % |" in printed


def test_time_of_queries_left_out_is_extrapolated():
    sweep = audit.Sweep(batches=2)
    assert list(sweep(range(0, 40, 4), "Reading features")) == list(range(0, 40, 4))
    assert list(sweep(range(0, 40, 4), "Comparing images")) == [0, 20]
    assert sweep.share == 5
    assert sweep.seconds > 0
