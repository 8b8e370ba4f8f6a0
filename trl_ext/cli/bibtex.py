"""A plugin's `citation`, one line of text, as BibTeX."""

from __future__ import annotations

import re

_ARXIV = re.compile(r"arXiv[: ](\d{2})(\d{2}\.\d{4,5})")
_YEAR = re.compile(r"\b(?:19|20)\d{2}$")
_AUTHORS = re.compile(r"(?P<names>[A-Z]\w+ et al\.|(?:[A-Z]\w+, )*[A-Z]\w+ and [A-Z]\w+), (?P<title>.+)")


def bibtex(name: str, citation: str) -> str:
    """Give one entry for each work that a citation names, works being separated by semicolons.

    Args:
        name: The plugin, which makes the keys of the entries.
        citation: For instance "Hu, Liu, Mao and Ma, Dr. Post-Training, arXiv:2605.07063". Authors may be left out, and
            then the entry has none.
    """
    works = [work.strip() for work in citation.split(";")]
    keys = [name, *(f"{name}-{number}" for number in range(2, len(works) + 1))]
    return "\n\n".join(_entry(key, work) for key, work in zip(keys, works, strict=True))


def _entry(key: str, work: str) -> str:
    found = _ARXIV.search(work)
    about = re.sub(r"^[Bb]aseline of ", "", work[: found.start()] if found else work).rstrip(" ,")
    authors = _AUTHORS.fullmatch(about)
    title = authors["title"] if authors else about
    year = _YEAR.search(title)
    fields = {
        "author": _names(authors["names"]) if authors else "",
        "title": title[: year.start()].rstrip(" ,") if year else title,
        "year": f"20{found[1]}" if found else year[0] if year else "",
        "eprint": f"{found[1]}{found[2]}" if found else "",
        "archivePrefix": "arXiv" if found else "",
    }
    lines = [f"  {field} = {{{value}}}," for field, value in fields.items() if value]
    return "\n".join([f"@misc{{{key},", *lines, "}"])


def _names(text: str) -> str:
    return text.replace(" et al.", " and others").replace(", ", " and ")
