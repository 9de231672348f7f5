"""The benchmark of the label audit: its measures, and that it runs on the folder of a trained run."""

import csv
import dataclasses

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks.audit import calibration, features, findings, review, review_curve, tables
from benchmarks.audit.__main__ import write
from benchmarks.audit.evidence import evidence, measures
from benchmarks.audit.methods import METHODS, Verdict
from benchmarks.audit.review_curve import plot, print_review
from benchmarks.audit.speed import Case, Sweep, run_case
from ntdne_kernels.audit import audit_labels
from ntdne_kernels.experiments.encoders import make_encoder
from ntdne_kernels.experiments.settings import Settings


def test_a_verdict_is_measured_against_the_labels_that_are_wrong():
    wrong = torch.tensor([True, False, True, False])
    suspects = torch.tensor([True, True, True, False])
    verdict = Verdict(torch.tensor([0.1, 0.2, 0.3, 0.4]), {"rate": suspects}, 0.4)
    found = {(chosen, metric): value for chosen, metric, value in measures(verdict, wrong)}
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
    write(evidence(tmp_path, None), file)
    rows = list(csv.DictReader(file.open()))
    aurocs = {row["method"]: float(row["value"]) for row in rows if row["metric"] == "auroc"}
    assert aurocs.keys() == METHODS.keys()
    assert min(aurocs.values()) > 0.5  # of an untrained encoder, whose images are all alike
    capsys.readouterr()
    tables.print_evidence(file)
    printed = capsys.readouterr().out
    assert f"{100 * aurocs['ours']:.1f}" in printed
    assert "| digits | uniform 0.3 | 27 % |" in printed


def test_methods_are_compared_on_made_features_and_go_on_where_they_were(tmp_path, capsys, monkeypatch):
    made = torch.Generator().manual_seed(0)
    true = torch.arange(300) % 10
    rows = torch.eye(10)[true] + 0.1 * torch.randn(300, 10, generator=made)
    archive = features.Features("made", rows, true, [str(name) for name in range(10)])
    monkeypatch.setattr(features, "METHODS", {name: METHODS[name] for name in ("ours", "K-NN vote")})
    file = tmp_path / "features.csv"
    features.audit_features(archive, 1, file)
    whole = file.read_text()
    file.write_text(whole[: whole.index("made,uniform,0.1,0,K-NN vote")])
    features.audit_features(archive, 1, file)
    assert [row["method"] for row in features.read_rows(file)] == [
        row["method"] for row in csv.DictReader(whole.split("\n"))
    ]
    capsys.readouterr()
    tables.print_features(file)
    printed = capsys.readouterr().out.splitlines()
    ours = next(line for line in printed if line.startswith("| ours |")).split(" | ")
    assert min(map(float, ours[1:5])) > 95
    assert [line for line in printed if line.startswith("| K-NN vote | ")]


def test_weights_kept_for_a_review_give_the_audit_of_a_pass():
    made = torch.Generator().manual_seed(0)
    true = torch.arange(200) % 4
    rows = torch.eye(8)[true] + 0.3 * torch.randn(200, 8, generator=made)
    known = review.Reviewer((true + (torch.arange(200) % 7 == 0)) % 4, true, torch.arange(30))
    labels = torch.where(known.checked, true, known.given)
    expected = audit_labels(rows, labels, sigma=0.05, checked=known.checked, given=known.given)
    found = review.audit_again(rows, review.Weights(rows, 0.05), known)
    torch.testing.assert_close(found.log_ratio, expected.log_ratio, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.top_shares, expected.top_shares, rtol=1e-4, atol=1e-6)


def test_a_review_finds_wrong_labels_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    made = torch.Generator().manual_seed(0)
    true = torch.arange(400) % 10
    rows = torch.eye(10)[true] + 0.35 * torch.randn(400, 10, generator=made)
    archive = features.Features("made", rows, true, [str(name) for name in range(10)])
    monkeypatch.setattr(review, "NOISES", [("uniform", 0.3)])
    monkeypatch.setattr(review, "ROUNDS", (0, 100, 200))
    monkeypatch.setattr(review_curve, "SHOWN", (100, 200))
    file = tmp_path / "review.csv"
    review.review(archive, 1, file)
    whole = file.read_text()
    file.write_text(whole[: whole.index("made,uniform,0.3,0,by quality")])
    review.review(archive, 1, file)
    assert file.read_text() == whole
    rows = features.read_rows(file)
    found = {(row["order"], row["decisions"], row["metric"]): float(row["value"]) for row in rows}
    total, best, fixed = found["ours", "0", "wrong"], found["ours", "200", "found"], found["fixed", "200", "found"]
    assert found["ours", "100", "found"] == found["fixed", "100", "found"]
    assert total >= best > 1.5 * found["random", "200", "found"]
    assert abs(found["ours", "200", "estimated"] - total) < 20
    capsys.readouterr()
    print_review(file)
    lines = capsys.readouterr().out.splitlines()
    share = f"{best:.0f} ({100 * best / total:.1f} %)"
    assert [line for line in lines if line.startswith("| uniform 0.3 | ours | 1 |") and line.endswith(f"| {share} |")]
    more = f"{best - fixed:+.1f} ({best - fixed:+.0f})"
    assert [line for line in lines if line.startswith("| uniform 0.3 | ours |") and line.endswith(f"| {more} |")]
    plot(file, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_archives_have_review_tables_of_their_own(tmp_path, capsys):
    file = tmp_path / "review.csv"
    found = {"large": {0: 0, 200: 150, 500: 300, 2000: 400}, "small": {0: 0, 200: 40, 500: 50}}
    rows = []
    for dataset, by_decisions in found.items():
        run: features.Row = {"dataset": dataset, "noise": "uniform", "rate": "0.1", "seed": "0"}
        for order in ("fixed", "random"):
            rows.append(run | {"order": order, "decisions": 0, "metric": "wrong", "value": max(by_decisions.values())})
            for n, value in by_decisions.items():
                rows.append(run | {"order": order, "decisions": n, "metric": "found", "value": value})
    features.write_rows(rows, file)
    file.write_text("".join(line for line in file.open() if "small,uniform,0.1,0,random" not in line))
    print_review(file)
    lines = capsys.readouterr().out.splitlines()
    assert "| noise | order | seeds | wrong | 200 | 500 | 2,000 |" in lines
    assert "| uniform 0.1 | random | 1 | 400 | 150 (37.5 %) | 300 (75.0 %) | 400 (100.0 %) |" in lines
    assert lines.count("| noise | order | seeds | wrong | 200 | 500 |") == 1
    assert "| uniform 0.1 | fixed | 1 | 50 | 40 (80.0 %) | 50 (100.0 %) |" in lines
    assert "| uniform 0.1 | random | 1 | 50 | 40 (80.0 %) | 50 (100.0 %) |" not in lines


class PixelEncoder:
    """An encoder for tests: pictures of 8 pixels a side, one level brighter, so that black has a direction."""

    def __init__(self, archive: findings.Archive, name: str, image_size: int) -> None:
        pass

    def __call__(self, pictures: list[Image.Image]) -> torch.Tensor:
        small = [np.asarray(picture.convert("L").resize((8, 8))).astype("float32").ravel() for picture in pictures]
        return torch.from_numpy(np.stack(small)) + 1


def test_findings_in_scans_of_digits_are_written_and_drawn(tmp_path, capsys, monkeypatch):
    digits = load_digits()
    pixels = (digits.data[:800] * 15).round()
    np.save(tmp_path / "features.npy", (pixels + 1).astype("float32"))
    np.save(tmp_path / "labels.npy", digits.target[:800])
    names = [f"{image}.png" for image in range(800)]
    (tmp_path / "files.txt").write_text("\n".join(names) + "\n")
    for name, scan in zip(names, pixels, strict=True):
        Image.fromarray(scan.reshape(8, 8).astype("uint8")).save(tmp_path / name)
    monkeypatch.setattr(findings, "Encoder", PixelEncoder)
    monkeypatch.setattr(findings, "COPIES", 20)
    changes = {"as it was": lambda picture: picture, "turned dark": lambda picture: picture.point(lambda x: x % 7)}
    monkeypatch.setattr(findings, "CHANGES", changes)
    monkeypatch.setattr(findings, "JOINED", 5)
    archive = findings.read_archive(tmp_path / "features.npy", tmp_path / "labels.npy", tmp_path)
    file = tmp_path / "findings.csv"
    for _ in range(2):  # the second time in the place of the first
        findings.findings(archive, "pixels", 8, file)
    rows = {(row["finding"], row["case"]): row for row in features.read_rows(file)}
    assert len(rows) == len(features.read_rows(file)) == 14
    found = {case: (int(row["made"]), int(row["named"])) for case, row in rows.items()}
    assert found["copies", "as it was"] == (20, 20)
    assert found["copies", "turned dark"] == (20, 0)
    assert found["merge", "divided at random, with --force"] == (10, 10)
    assert found["split", "two classes under one name"][0] == 5
    assert sum(made for (finding, _), (made, _) in found.items() if finding == "outliers") == 16
    capsys.readouterr()
    tables.print_findings(file)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"**{tmp_path.name}: what was made and is named, and what else is named**"
    assert f"| copies | as it was | 20 | 20 | {rows['copies', 'as it was']['others']} |" in lines


def test_the_calibration_is_written_and_drawn(tmp_path, capsys, monkeypatch):
    made = torch.Generator().manual_seed(0)
    true = torch.arange(300) % 3
    good = torch.eye(8)[true] + 0.05 * torch.randn(300, 8, generator=made)
    chance = torch.randn(300, 8, generator=made)
    images = torch.rand(300, 3, 8, 8, generator=made)
    archive = calibration.Archive(
        "made", true, {"good": good, "chance": chance}, images, {"NTDNE": (0, 1), "cross-entropy": (1,)}
    )
    monkeypatch.setattr(calibration, "archives", lambda scenes: [archive])
    monkeypatch.setattr(calibration, "NOISES", [("uniform", 0.0), ("next class", 0.3)])
    file = tmp_path / "calibration.csv"
    write(calibration.calibrate(None), file)
    capsys.readouterr()
    tables.print_calibration(file)
    lines = capsys.readouterr().out.splitlines()
    assert "| images | features | uniform 0.0 | next class 0.3 |" in lines
    rows = list(csv.DictReader(file.open()))
    wrong = 100 * float(rows[-1]["true_rate"])
    assert 20 < wrong < 40
    (row,) = (line for line in lines if line.startswith("| made | good |"))
    assert row == f"| made | good | 0 | {wrong:.0f} |"
    assert [line for line in lines if line.startswith("| made | chance | (")]
    assert {row["features"] for row in rows[4:]} >= {"untrained", "NTDNE, 1 epochs", "cross-entropy, 1 epochs"}
    of_errors = [line.split(" | ") for line in lines[-6:] if " to " in line or "and more" in line]
    assert sum(int(cells[1]) for cells in of_errors) == len(rows) == 10


def test_the_time_of_an_audit_is_that_of_its_comparisons_and_more():
    found = run_case(Case(N=5000, D=8, C=3, dtype="float32", batches=1))
    assert 0 < found["sweep_seconds"] < found["seconds"]
    assert found["extrapolated"]
    assert not run_case(Case(N=500, D=8, C=3, dtype="float32", batches=0))["extrapolated"]


def test_time_of_queries_left_out_is_extrapolated():
    sweep = Sweep(batches=2)
    assert list(sweep(range(0, 40, 4), "Comparing images")) == [0, 20]
    assert sweep.share == 5
    assert sweep.seconds > 0
