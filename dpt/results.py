"""The pages of docs/log: each section is written by a command and says which."""

import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from dpt.files import read_text, write_text

LOG = Path(__file__).resolve().parents[1] / "docs/log"
RESULTS = LOG.with_name("results.md")
MOST_COLUMNS = 9
"""Columns of a table that can be read on a page."""


def check_replaceable(path: Path, read: Callable[[Path], object], *figures: Path) -> None:
    """Raises ValueError where results would take the place of files that are not such results.

    Args:
        path: may be there if `read` takes it; else it raises ValueError.
        figures: written after it, so that there are none without it.
    """
    if path.exists():
        try:
            read(path)
        except ValueError as error:
            raise ValueError(f"{error}; so {path} is not of this command, choose another --output") from error
    elif others := [other for other in figures if other.exists()]:
        raise ValueError(f"{others[0]} is there, and not of this command; choose another --output")


def markdown_table(header: list[str], rows: Iterable[Iterable], *, keys: int = 1) -> str:
    """A Markdown table; in place of one with more than nine columns, several tables.

    Args:
        keys: the first so many columns are repeated in each table.
    """
    lines, tables = [[str(cell) for cell in row] for row in (header, *rows)], []
    for start in range(keys, max(len(header), keys + 1), MOST_COLUMNS - keys):
        shown = [line[:keys] + line[start : start + MOST_COLUMNS - keys] for line in lines]
        shown.insert(1, ["---"] * len(shown[0]))
        tables.append("".join(f"| {' | '.join(line)} |\n" for line in shown))
    return "\n".join(tables)


def page_of(page: Path, section: str) -> Path:
    """The page that a section is written to.

    Args:
        page: a Markdown file; of the folder `LOG` its page with that section, or docs/results.md if there is none.
    """
    if page != LOG:
        return page
    begin = f"<!-- begin {section} -->"
    return next((one for one in sorted(LOG.glob("*.md")) if begin in read_text(one)), RESULTS)


def figure_beside(path: Path, name: str) -> Path:
    """A figure's place beside a Markdown file. Raises ValueError where one is there that the file does not show."""
    figure = path.with_name(name)
    if figure.exists() and not (path.exists() and f"]({name})" in read_text(path)):
        raise ValueError(f"{figure} is there, and {path} does not show it; move it, or name another file")
    return figure


def record_section(path: Path, name: str, command: str, text: str) -> None:
    """Puts a section, with its command and commit, in place of the section of that name, or at the end; says where."""
    describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(describe, cwd=LOG, capture_output=True, text=True).stdout.strip() or "unknown"
    body = f"`{command}`, recorded at commit {commit}:\n\n{text}"
    block = f"<!-- begin {name} -->\n{body}\n<!-- end {name} -->"
    old = read_text(path) if path.exists() else "# Results\n"
    pattern = re.compile(rf"<!-- begin {re.escape(name)} -->.*?<!-- end {re.escape(name)} -->", re.DOTALL)
    new = pattern.sub(lambda _: block, old) if pattern.search(old) else f"{old.rstrip()}\n\n{block}\n"
    write_text(path, new)
    print(f"recorded in {path}, section {name!r}")
