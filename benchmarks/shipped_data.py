"""The training manifest of the shipped model: dataset_b, and kermany's films of dataset_c in the classes of dataset_b.

    python benchmarks/shipped_data.py --out train.csv [--data-root CXR]
    magsd train --config configs/covid-cxr.yaml --data train.csv --out run

kermany is a third hospital with films of both pneumonia and healthy: within it, no source gives the class away.
No image is copied; paths are absolute.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from elsewhere import LABELS
from magsd_runtime.errors import DataError, MagsdError
from magsd_runtime.files import write_text
from scores import default_data_root

COLUMNS = ["path", "label", "patient", "source", "view", "age", "sex", "finding"]


def rows_of(data_root: Path) -> list[dict[str, str]]:
    """All rows of dataset_b and the kermany rows of dataset_c, relabelled, with absolute paths.

    Raises
    ------
    DataError
        If a table is not there.
    """
    rows: list[dict[str, str]] = []
    for name, wanted in (("dataset_b.csv", None), ("dataset_c.csv", "kermany")):
        try:
            with open(data_root / name, newline="", encoding="utf-8") as file:
                found = list(csv.DictReader(file))
        except OSError as error:
            raise DataError(f"{data_root / name}: cannot be read ({error.strerror})") from error
        for row in found:
            if wanted is None or row["source"] == wanted:
                label = LABELS.get(row["label"], row["label"])
                rows.append({**row, "label": label, "path": str((data_root / row["path"]).absolute())})
    return rows


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", required=True, type=Path, metavar="M.csv")
    parser.add_argument("--data-root", type=Path, default=default_data_root(), metavar="CXR",
                        help="folder of dataset_b.csv (default: $MAGSD_DATA, or shared/data/cxr)")  # fmt: skip
    options = parser.parse_args(argv)
    try:
        rows = rows_of(options.data_root)
    except MagsdError as error:
        print(f"shipped_data: {error}", file=sys.stderr)
        return error.exit_code
    write_text(options.out, table(rows))
    for (label, source), count in sorted(Counter((row["label"], row["source"]) for row in rows).items()):
        print(f"{label:<10} {source:<8} {count:>5}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
