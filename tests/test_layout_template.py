"""The template by which the runtime knows how a film lies: on whom it is fitted, and that fitting it works."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

import layout_template
from drawn_film import drawn_film
from magsd_runtime.pixel_rules import LAYOUT_PATH, layout_scores, layout_thumbnail
from magsd_runtime.pixel_rules import layout_template as packaged


def test_half_of_the_patients_and_never_a_source_that_is_left_out() -> None:
    rows = [{"patient": f"p{number}", "source": "one"} for number in range(400)]
    chosen = [row for row in rows if layout_template.chosen_on(row)]
    assert 150 < len(chosen) < 250
    assert chosen == [row for row in rows if layout_template.chosen_on({**row, "path": "another film"})]
    assert not any(layout_template.chosen_on({**row, "source": "kermany"}) for row in rows)
    assert not any(layout_template.chosen_on(row, ["one"]) for row in rows)


def test_the_command_fits_a_template_that_knows_other_films(tmp_path: Path) -> None:
    lines = ["path,label,patient,source"]
    for number in range(24):
        cv2.imwrite(str(tmp_path / f"{number}.png"), drawn_film(number))
        lines.append(f"{number}.png,healthy,p{number},drawn")
    (tmp_path / "films.csv").write_text("\n".join(lines))
    out = tmp_path / "layout.npy"
    assert layout_template.main(["--data", str(tmp_path / "films.csv"), "--out", str(out)]) == 0
    template = np.load(out)
    assert (template.shape, template.dtype) == ((16, 16), np.float32)
    for seed in range(100, 110):
        film = drawn_film(seed)
        for way, turned in ((0, film), (2, np.rot90(film, 2)), (8, 255 - film)):
            scores = layout_scores(layout_thumbnail(np.ascontiguousarray(turned)), template)
            assert int(scores.argmax()) % 8 in ({0, 6} if way != 2 else {2, 4})
            assert (int(scores.argmax()) >= 8) == (way == 8)
    assert layout_template.main(["--data", str(tmp_path / "gone.csv"), "--out", str(out)]) == 2


def test_the_packaged_template() -> None:
    assert LAYOUT_PATH.stat().st_size < 2000
    assert packaged().shape == (16, 16)
    assert np.isfinite(packaged()).all()
