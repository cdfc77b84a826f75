"""Pieces of a self-contained HTML page: escaped tables, lists and pictures inside the page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

WARNING = "<strong>Warning.</strong> "

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1b2733;
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 0 1.5rem 3rem; }
.research { background: #7a1f1f; color: #fff; text-align: center; padding: .45rem 1rem; font-weight: 600; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 1.6rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .9rem; border-top: 1px solid #dfe4e9; }
p, li { max-width: 48rem; }
.sub, figcaption, caption, .small { color: #556270; font-size: .9rem; }
.notes { list-style: none; margin: 1.2rem 0; padding: 0; }
.notes li { max-width: none; margin: .5rem 0; padding: .55rem .9rem;
  border-left: 4px solid #9fb0c0; background: #f4f6f8; }
.notes li.warning { border-color: #c77700; background: #fff6e6; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.2rem, 1fr)); gap: .8rem;
  margin: 1rem 0; }
.card { border: 1px solid #dfe4e9; border-radius: 6px; padding: .7rem .9rem; }
.card h3 { margin: 0; font-size: .9rem; font-weight: 600; color: #556270; }
.card .value { font-size: 1.75rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.card .more { font-size: .82rem; color: #556270; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .35rem; }
th, td { padding: .32rem .75rem; border-bottom: 1px solid #e6eaee; text-align: right; vertical-align: top; }
thead th { border-bottom: 2px solid #b9c4ce; font-weight: 600; }
th:first-child, td.text { text-align: left; overflow-wrap: anywhere; }
tbody th { font-weight: 500; }
tr.main td, tr.main th { font-weight: 700; background: #f0f6fb; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.2rem;
  align-items: end; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; }
figure.narrow img, .figures img { max-width: min(100%, 30rem); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .92rem; }
dt { color: #556270; } dd { margin: 0; overflow-wrap: anywhere; }
@media print {
  body { font-size: 11pt; } main { max-width: none; padding: 0; }
  h2, tr, figure, .card, .notes li { break-inside: avoid; } h2 { break-after: avoid; }
  .research, .notes li, tr.main td { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def definitions(values: Mapping[str, Any]) -> str:
    items = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_shown(value))}</dd>" for name, value in values.items()
    )
    return f"<dl>{items}</dl>"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name or '(not named)'} {_shown(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    return "–" if value is None else str(value)


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str = "",
    main: Sequence[bool] = (),
    text_columns: set[int] | frozenset[int] = frozenset(),
) -> str:
    """All cells are escaped here. The first column heads its row; ``main`` marks rows to stress."""
    head = "".join(
        f'<th scope="col"{_left(index, text_columns)}>{escape(name)}</th>' for index, name in enumerate(header)
    )
    body = []
    for number, row in enumerate(rows):
        cells = f'<th scope="row">{escape(row[0])}</th>' + "".join(
            f'<td class="text">{escape(cell)}</td>' if index in text_columns else f"<td>{escape(cell)}</td>"
            for index, cell in enumerate(row[1:], start=1)
        )
        stressed = ' class="main"' if number < len(main) and main[number] else ""
        body.append(f"<tr{stressed}>{cells}</tr>")
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    content = f"{title}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll"><table>{content}</table></div>'


def _left(index: int, text_columns: set[int] | frozenset[int]) -> str:
    return ' style="text-align:left"' if index in text_columns else ""


def figure(images: Mapping[str, str], name: str, alt: str, caption: str, kind: str = "") -> str:
    if name not in images:
        return ""
    style = f' class="{kind}"' if kind else ""
    picture = f'<img src="{images[name]}" alt="{escape(alt)}">'
    return f"<figure{style}>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def with_deviation(score: Mapping[str, float | None]) -> str:
    deviation = "" if score["std"] is None else f" ± {score['std']:.3f}"
    return number(score["value"]) + deviation


def interval(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
