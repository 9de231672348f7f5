"""interchange.cleanlab: pandas in and out, and cleanlab's numbers beside the audit's own."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ntdne_kernels.audit import LabelAudit, audit_labels
from ntdne_kernels.interchange import noise_matrix, pred_probs, register_issue_manager, to_frame

pd = pytest.importorskip("pandas")

NAMES = ["01", "NA", 'wood, "wet"', "Straße\nnord"]  # each is misread by some reader of CSV
READ = {  # as the module advises
    "keep_default_na": False,
    "na_values": [""],
    "dtype": {"path": str, "given_label": str, "predicted_label": str, "duplicate_of": "Int64"},
}


def made(N: int = 120, C: int = 4, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit rows (N, 6) in C overlapping groups, and labels (N,) of which a quarter are drawn anew."""
    draw = torch.Generator().manual_seed(seed)
    groups = torch.arange(N) % C
    centres = torch.randn(C, 6, generator=draw)
    features = nn.functional.normalize(centres[groups] + 0.7 * torch.randn(N, 6, generator=draw), dim=1)
    redrawn = torch.rand(N, generator=draw) < 0.25
    return features, torch.where(redrawn, torch.randint(C, (N,), generator=draw), groups)


def every_case() -> tuple[LabelAudit, list[str]]:
    """Flips, an image without a label, a class of one image, an exact copy under another label; and paths."""
    features, codes = made()
    features[7] = features[3]
    labels = [NAMES[code] for code in codes]
    labels[3], labels[7], labels[5], labels[11] = NAMES[0], NAMES[1], None, "alone"
    paths = [f'fold, {image}/ä "{image}".png' for image in range(len(labels))]
    return audit_labels(features, labels, sigma=0.2), paths


def test_a_frame_has_a_row_for_each_image_in_order():
    audit, paths = every_case()
    frame = to_frame(audit, paths=paths)
    assert list(frame.index) == list(range(120))
    assert list(frame["path"]) == paths
    names = np.array([*audit.classes, None], dtype=object)
    assert list(frame["given_label"].astype(object).where(frame["given_label"].notna(), None)) == list(
        names[audit.labels]
    )
    assert list(frame["predicted_label"]) == list(names[audit.suggested])
    for column, values in {
        "is_label_issue": audit.suspects(),
        "label_score": audit.quality,
        "score": audit.score,
        "suggested_share": audit.suggested_share,
        "log_density": audit.log_density,
        "conflicting": audit.conflicting,
    }.items():
        np.testing.assert_array_equal(frame[column], values, err_msg=column)
    assert list(frame.sort_values("rank").index) == audit.ranking.tolist()
    assert sorted(frame["rank"]) == list(range(1, 121))
    assert frame["duplicate_of"].dropna().to_dict() == {7: 3}
    assert frame.loc[[3, 7], "conflicting"].all()


def test_images_that_were_not_judged_are_no_issue_and_come_last():
    frame = to_frame(every_case()[0])
    assert list(frame.index[frame["label_score"].isna()]) == [5, 11]
    assert not frame.loc[[5, 11], "is_label_issue"].any()
    assert set(frame.loc[[5, 11], "rank"]) == {119, 120}
    assert frame["given_label"].isna().sum() == 1
    assert np.isnan(frame.loc[5, "score"])
    assert frame.loc[11, "score"] == 0


def test_another_method_chooses_other_issues():
    audit, _ = every_case()
    np.testing.assert_array_equal(to_frame(audit, method=0.3)["is_label_issue"], audit.suspects(0.3))
    assert to_frame(audit, method=0.9)["is_label_issue"].sum() > to_frame(audit, method=0.3)["is_label_issue"].sum() > 0


def test_integer_classes_stay_integers():
    features, codes = made()
    codes[0] = -1
    frame = to_frame(audit_labels(features, torch.where(codes < 0, -1, codes * 10)))
    assert "path" not in frame
    assert frame["given_label"].dtype.categories.tolist() == [0, 10, 20, 30]
    assert frame["given_label"].isna().sum() == 1
    assert frame.loc[1, "given_label"] == 10 * codes[1]


def test_paths_must_be_one_per_image():
    audit, paths = every_case()
    assert list(to_frame(audit, paths=map(Path, paths))["path"]) == paths
    assert list(to_frame(audit, paths=pd.Series(paths, index=range(200, 320)))["path"]) == paths
    with pytest.raises(ValueError, match="paths: expected one for each of the 120 images, got 119"):
        to_frame(audit, paths=paths[1:])


def test_a_file_name_that_is_not_utf_8_is_kept(tmp_path):
    audit, paths = every_case()
    frame = to_frame(audit, paths=[b"na\xefve.png", *paths[1:]])
    frame.to_csv(tmp_path / "audit.csv", index=False, errors="surrogateescape")
    assert b"na\xefve.png," in (tmp_path / "audit.csv").read_bytes()


def test_a_csv_keeps_every_value(tmp_path):
    audit, paths = every_case()
    frame = to_frame(audit, paths=paths)
    frame.to_csv(tmp_path / "audit.csv", index=False)
    read = pd.read_csv(tmp_path / "audit.csv", **READ)
    pd.testing.assert_frame_equal(read.astype(frame.dtypes), frame, check_exact=True)
    with (tmp_path / "audit.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))  # as FiftyOne's CSVDataset reads it, which skips empty fields
    assert [row["path"] for row in rows] == paths
    assert [row["given_label"] for row in rows] == ["" if name is np.nan else name for name in frame["given_label"]]
    assert [image for image, row in enumerate(rows) if not row["label_score"]] == [5, 11]


def test_parquet_keeps_every_value(tmp_path):
    pytest.importorskip("pyarrow")
    audit, paths = every_case()
    frame = to_frame(audit, paths=paths)
    frame.to_parquet(tmp_path / "audit.parquet")
    read = pd.read_parquet(tmp_path / "audit.parquet").astype({"path": object})
    pd.testing.assert_frame_equal(read, frame, check_exact=True)


def test_labels_of_pandas_belong_to_features_by_position():
    features, codes = made()
    names = [NAMES[code] for code in codes]
    names[5] = None
    expected = to_frame(audit_labels(features, names))
    table = pd.DataFrame(features.numpy(), index=range(500, 380, -1), columns=[f"f{d}" for d in range(6)])
    table["label"] = names
    floats = table[[f"f{d}" for d in range(6)]]
    for labels in (table["label"], table["label"].astype("category"), table["label"].astype("string")):
        pd.testing.assert_frame_equal(to_frame(audit_labels(floats, labels)), expected)
    numbers = pd.Series([*codes[:5].tolist(), None, *codes[6:].tolist()], index=table.index, dtype="Int64")
    frame = to_frame(audit_labels(floats, numbers))
    pd.testing.assert_frame_equal(
        frame.drop(columns=["given_label", "predicted_label"]),
        expected.drop(columns=["given_label", "predicted_label"]),
    )
    assert frame["given_label"].isna().tolist() == expected["given_label"].isna().tolist()


def test_pred_probs_are_the_leave_one_out_class_shares():
    features, codes = made()
    codes[:6] = -1
    audit = audit_labels(features, codes, sigma=0.2, ridge=False)
    mass = (features.double() @ features.double().T / 0.2).exp().fill_diagonal_(0)
    shares = torch.stack([mass[:, codes == c].sum(dim=1) for c in range(4)], dim=1) / mass.sum(dim=1, keepdim=True)
    np.testing.assert_allclose(pred_probs(audit), shares, rtol=1e-5)


def test_pred_probs_need_every_class():
    features, codes = made()
    with pytest.raises(ValueError, match=r"shares of all 4 classes, got the largest 3; audit with top=4"):
        pred_probs(audit_labels(features, codes, top=3))


def test_cleanlab_counts_the_same_confident_joint_and_noise():
    count = pytest.importorskip("cleanlab.count")
    features, codes = made()
    audit = audit_labels(features, codes, sigma=0.2)
    shares, labels = pred_probs(audit), codes.numpy()
    counts = count.compute_confident_joint(labels, shares, calibrate=False)
    calibrated = counts / counts.sum(axis=1, keepdims=True) * np.bincount(labels)[:, None]
    assert (counts != np.diag(np.diag(counts))).any()
    ours = audit.joint.T.numpy() * len(audit)
    np.testing.assert_allclose(ours, calibrated, rtol=1e-12)
    rounded = count.compute_confident_joint(labels, shares)  # cleanlab's is in whole images
    assert (np.abs(ours - rounded) < 1).all()
    assert audit.noise_rate == pytest.approx(1 - calibrated.trace() / len(audit))
    np.testing.assert_allclose(noise_matrix(audit), count.estimate_latent(calibrated, labels)[1], rtol=1e-12)


def test_score_is_cleanlabs_self_confidence():
    rank = pytest.importorskip("cleanlab.rank")
    features, codes = made(C=3)
    audit = audit_labels(features, codes, sigma=0.2)
    theirs = rank.get_label_quality_scores(codes.numpy(), pred_probs(audit), method="self_confidence")
    np.testing.assert_allclose(audit.label_share, theirs, rtol=1e-5, atol=1e-6)
    alone = audit_labels(features, codes, sigma=0.2, ridge=False)
    theirs = rank.get_label_quality_scores(codes.numpy(), pred_probs(alone), method="self_confidence")
    np.testing.assert_allclose(alone.score, theirs, rtol=1e-5, atol=1e-6)


def test_datalab_takes_an_audit_as_an_issue(capsys):
    Datalab = pytest.importorskip("cleanlab").Datalab
    pytest.importorskip("datasets")
    audit, paths = every_case()
    register_issue_manager()
    register_issue_manager()
    assert "Overwriting" not in capsys.readouterr().out
    lab = Datalab({"path": paths})
    lab.find_issues(issue_types={"ntdne_label": {"audit": audit, "method": 0.3}})
    frame, issues = to_frame(audit, method=0.3), lab.get_issues("ntdne_label")
    assert list(issues.columns) == ["is_ntdne_label_issue", "ntdne_label_score"]
    np.testing.assert_array_equal(issues["is_ntdne_label_issue"], frame["is_label_issue"])
    np.testing.assert_array_equal(issues["ntdne_label_score"], frame["label_score"].fillna(1))
    (summary,) = lab.get_issue_summary("ntdne_label").to_dict("records")
    assert summary["num_issues"] == frame["is_label_issue"].sum() > 0
    assert summary["score"] == pytest.approx(1 - audit.noise_rate)
    info = lab.get_info("ntdne_label")
    assert info["predicted_label"] == list(frame["predicted_label"])
    assert info["average_label_quality"] == pytest.approx(frame["label_score"].mean())
    lab.report(verbosity=4)
    report = capsys.readouterr().out
    assert f"Number of examples with this issue: {summary['num_issues']}" in report
    assert "num_not_judged: 2" in report
    assert f"noise_rate: {audit.noise_rate}" in report


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # cleanlab's, of pandas 3
def test_datalab_names_its_columns_as_the_frame():
    Datalab = pytest.importorskip("cleanlab").Datalab
    pytest.importorskip("datasets")
    features, codes = made()
    audit = audit_labels(features, [NAMES[code] for code in codes], sigma=0.2)
    frame = to_frame(audit)
    register_issue_manager()
    lab = Datalab(frame, label_name="given_label")
    lab.find_issues(pred_probs=pred_probs(audit), issue_types={"label": {}, "ntdne_label": {"audit": audit}})
    issues = lab.get_issues("label")
    own = ["is_label_issue", "label_score", "given_label", "predicted_label"]
    assert set(issues.columns) == {*own, "is_ntdne_label_issue", "ntdne_label_score"}
    assert set(own) < set(frame.columns)
    for column in ("given_label", "predicted_label"):
        assert list(issues[column]) == list(frame[column])


def test_datalab_refuses_an_audit_of_other_images():
    Datalab = pytest.importorskip("cleanlab").Datalab
    pytest.importorskip("datasets")
    register_issue_manager()
    lab = Datalab({"path": ["a.png", "b.png"]})
    with pytest.raises(ValueError, match="audit: expected one of the Datalab's 2 examples, got 120"):
        lab.find_issues(issue_types={"ntdne_label": {"audit": every_case()[0]}})


def test_a_missing_library_is_named(monkeypatch):
    audit, _ = every_case()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_frame needs pandas: pip install 'ntdne_kernels\[audit\]'"):
        to_frame(audit)
    monkeypatch.setitem(sys.modules, "cleanlab.datalab.internal.issue_manager", None)
    with pytest.raises(ImportError, match="Datalab needs cleanlab: pip install cleanlab datasets"):
        register_issue_manager.__wrapped__()
