"""The training manifest of the shipped model."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from magsd.data import read_manifest
from shipped_data import main

HEADER = "path,label,patient,source,view,age,sex,finding\n"


def test_kermany_joins_in_the_classes_of_b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dataset_b.csv").write_text(HEADER + "b/1.jpg,covid19,c:1,cohen,PA,70,M,COVID-19\n")
    (tmp_path / "dataset_c.csv").write_text(
        HEADER
        + "b/1.jpg,covid19,c:1,cohen,PA,70,M,COVID-19\n"
        + "k/1.jpg,viral_pneumonia,k:1,kermany,,,,virus\n"
        + "k/2.jpg,bacterial_pneumonia,k:2,kermany,,,,bacteria\n"
        + "k/3.jpg,healthy,k:3,kermany,,,,\n"
    )
    out = tmp_path / "elsewhere" / "train.csv"
    assert main(["--out", str(out), "--data-root", str(tmp_path)]) == 0
    manifest = read_manifest(out)
    assert [(record.label, record.patient) for record in manifest.records] == [
        ("covid19", "c:1"), ("pneumonia", "k:1"), ("pneumonia", "k:2"), ("healthy", "k:3"),
    ]  # fmt: skip
    assert manifest.records[1].path == tmp_path / "k" / "1.jpg"
    (tmp_path / "dataset_c.csv").unlink()
    assert main(["--out", str(out), "--data-root", str(tmp_path)]) == 2
    assert "dataset_c.csv: cannot be read" in capsys.readouterr().err


@pytest.mark.data
def test_the_real_counts(cxr: Path, tmp_path: Path) -> None:
    out = tmp_path / "train.csv"
    assert main(["--out", str(out), "--data-root", str(cxr)]) == 0
    with open(out, newline="") as file:
        counts = Counter((row["label"], row["source"]) for row in csv.DictReader(file))
    assert counts == {
        ("covid19", "cohen"): 426, ("healthy", "cohen"): 19, ("healthy", "kermany"): 320, ("healthy", "nih"): 499,
        ("pneumonia", "cohen"): 81, ("pneumonia", "kermany"): 637, ("pneumonia", "nih"): 424,
    }  # fmt: skip
