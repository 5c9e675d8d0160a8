"""The pages of docs/log: a command writes each section and is named in it."""

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


def check_figure(output: Path) -> None:
    """Raises ValueError unless a figure can be written under that name."""
    from matplotlib.figure import Figure  # not at the top: whoever asks for --help need not wait for it

    formats = Figure().canvas.get_supported_filetypes()
    if output.is_dir() or output.suffix.removeprefix(".") not in formats:
        raise ValueError(f"--output is {output}; it must be the name of a figure, such as {output.stem}.png")


def markdown_table(header: list[str], rows: Iterable[Iterable]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in (header, ["---"] * len(header), *rows))


def narrowed(text: str) -> str:
    """The text with tables of more than nine columns split; the columns that tell rows apart are repeated."""
    parts = re.split(r"((?:^\|.*\|\n)+)", text, flags=re.MULTILINE)
    return "".join(_narrow_tables(part) if part.startswith("|") else part for part in parts)


def _narrow_tables(table: str) -> str:
    header, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines())
    if len(header) <= MOST_COLUMNS:
        return table
    keys = next((k for k in range(1, MOST_COLUMNS - 1) if len({tuple(row[:k]) for row in rows}) == len(rows)), 1)
    width, tables = MOST_COLUMNS - keys, []
    for start in range(keys, len(header), width):
        head, *shown = (row[:keys] + row[start : start + width] for row in (header, *rows))
        tables.append(markdown_table(head, shown))
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
    body = f"`{command}`, recorded at commit {commit}:\n\n{narrowed(text)}"
    block = f"<!-- begin {name} -->\n{body}\n<!-- end {name} -->"
    old = read_text(path) if path.exists() else "# Results\n"
    pattern = re.compile(rf"<!-- begin {re.escape(name)} -->.*?<!-- end {re.escape(name)} -->", re.DOTALL)
    new = pattern.sub(lambda _: block, old) if pattern.search(old) else f"{old.rstrip()}\n\n{block}\n"
    write_text(path, new)
    print(f"recorded in {path}, section {name!r}")
