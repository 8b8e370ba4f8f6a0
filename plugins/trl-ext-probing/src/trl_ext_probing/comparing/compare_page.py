"""A comparison as one page for colleagues, which needs nothing beside itself: no script, no font, no file."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path

import yaml

from trl_ext_probing.comparing.compare_summary import Found
from trl_ext_probing.comparing.compare_table import COSTS_HEAD, HEAD, cells_of, costs_of, notes

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
thead th { background: var(--soft); font-weight: 600; }
tr.distinct td { background: #56b4e922; }
img { max-width: 100%; min-width: 40rem; height: auto; background: white; border-radius: 4px; }
pre { overflow-x: auto; padding: .8rem; background: var(--soft); border-radius: 4px; font-size: .8rem; }
@media (max-width: 40rem) {
  thead { display: none; }
  table, tbody, tr, td { display: block; }
  tr { padding: .5rem 0; border-bottom: 1px solid var(--line); }
  td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem .3rem; white-space: normal; }
  td:empty { display: none; }
  td:not(:first-child)::before { content: attr(data-head); opacity: .7; text-align: left; }
}
footer { margin-top: 2rem; font-size: .85rem; opacity: .75; }
"""


def page(found: Found, picture: Path) -> str:
    """The page.

    Args:
        found: The comparison.
        picture: Its plot, which is left out where there is none.
    """
    name = found.asked.where.stem + (f", size {found.settings.size}" if found.settings.size else "")
    parts = [f"<h1>{escape(name)}</h1>", *(f"<p>{escape(note)}</p>" for note in notes(found))]
    if picture.is_file():
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(
            '<div class="wide"><img alt="every seed of every arm, with means and intervals" '
            f'src="data:image/png;base64,{data}"></div>'
        )
    for metric in found.metrics:
        distinct = {arm for arm, cell in metric.cells.items() if cell.distinct}
        parts += [f"<h2>{escape(metric.title)}</h2>", _table(HEAD, cells_of(metric), distinct)]
    parts += ["<h2>Costs of one run</h2>", _table(COSTS_HEAD, costs_of(found))]
    content = yaml.safe_dump(dict(found.asked.content), sort_keys=False, allow_unicode=True)
    parts += [
        _folded("What was compared", content),
        _folded("Commands that train each run", "\n".join(found.commands)),
        f"<footer>Made by <code>{escape(found.settings.command)}</code>; the values of every seed are in results.json, "
        "times and memory in costs.json.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], distinct: Collection[str] = ()) -> str:
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr{' class=distinct' if cells[0] in distinct else ''}>"
        + "".join(f'<td data-head="{escape(name)}">{escape(cell)}</td>' for name, cell in zip(head, cells, strict=True))
        + "</tr>"
        for cells in rows
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _folded(head: str, text: str) -> str:
    return f"<details><summary>{escape(head)}</summary><pre>{escape(text)}</pre></details>"
