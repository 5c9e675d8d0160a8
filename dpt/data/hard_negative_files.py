"""Files of hard negatives for image-text matching, in the layouts that users have.

A folder holds `imgname2txtid.json`, {image file: [text ids]}, and one `{id:05d}.json` a text with `title`, `filepath`,
`neg_caption` and `neg_image`, the last two as Python-literal strings of lists. A `.tsv` holds the same four columns.
"""

import ast
import csv
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct, convert

from dpt.data.coco import Name, base_name, check_characters
from dpt.files import read_json, read_text, write_text

INDEX_FILE = "imgname2txtid.json"
FIELDS = ("title", "filepath", "neg_caption", "neg_image")
MAX_LIST = 100_000  # characters
_STRING = r"u?(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
_LIST = re.compile(rf"\s*\[\s*{_STRING}\s*(?:,\s*{_STRING}\s*)*,?\s*\]\s*", re.DOTALL)

TextId = Annotated[int, Meta(ge=0, le=10**12)]


class ItmRow(Struct):
    """An item as its file has it."""

    title: str
    filepath: Name
    neg_caption: str
    neg_image: str


@dataclass(frozen=True)
class ItmItem:
    """A caption, its image's file name, and captions and image files that are similar but not true of it."""

    title: str
    image: str
    neg_captions: tuple[str, ...]
    neg_images: tuple[str, ...]


class ItmNegatives:
    """Items by text id: a folder's are read when they are asked for, a `.tsv` at once.

    `texts_of` maps an image's name, without folders, to its text ids.

    Raises:
        ValueError: there is neither layout, or a file holds something else; it is named.
    """

    def __init__(self, path: Path):
        self.path, self._rows, self.texts_of = path, None, {}
        if path.is_dir():
            index = read_json(path / INDEX_FILE, dict[Name, list[TextId]])
        else:
            self._rows, index = _read_tsv(path), {}
            for i, row in enumerate(self._rows):
                index.setdefault(row.filepath, []).append(i)
        for name, ids in index.items():
            self.texts_of.setdefault(base_name(name), []).extend(ids)
        self.ids = sorted(i for ids in index.values() for i in ids)
        if not self.ids:
            raise ValueError(f"{path} holds no items")

    def __len__(self) -> int:
        return len(self.ids)

    @lru_cache(maxsize=4096)  # noqa: B019 of the class, so that samples can be sent to worker processes
    def item(self, text_id: int) -> ItmItem:
        """The captions and images of a text's number. Raises ValueError naming a file that holds something else."""
        if self._rows is None:
            where = self.path / f"{text_id:05d}.json"
            row = read_json(where, ItmRow)
        else:
            where, row = f"{self.path}, row {text_id + 1}", self._rows[text_id]
        try:
            lists = [_literal_list(name, getattr(row, name)) for name in FIELDS[2:]]
            return ItmItem(check_characters("title", row.title), check_characters("filepath", row.filepath), *lists)
        except ValueError as error:
            raise ValueError(f"{where} is no item of hard negatives: {error}") from error


def _literal_list(name: str, text: str) -> tuple[str, ...]:
    """The strings of a Python-literal list. Its form is checked first: Python's parser takes lists of any depth."""
    if len(text) > MAX_LIST or not _LIST.fullmatch(text):
        raise ValueError(f"{name}: {text[:60]!r} is no list of strings")
    try:
        return tuple(check_characters(name, value) for value in ast.literal_eval(text.strip()))
    except SyntaxError as error:  # such as an escape that is cut off
        raise ValueError(f"{name}: {text[:60]!r} is no list of strings") from error


def _read_tsv(path: Path) -> list[ItmRow]:
    csv.field_size_limit(2**24)
    try:
        reader = csv.DictReader(StringIO(read_text(path), newline=""), delimiter="\t")
        missing = [name for name in FIELDS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    for number, row in enumerate(rows, 1):
        if empty := [name for name in FIELDS if row[name] is None or not (row[name] or name == "title")]:
            raise ValueError(f"{path}, row {number}: {empty[0]} is missing")
    return [convert({name: row[name] for name in FIELDS}, ItmRow) for row in rows]


def write_items(folder: Path, items: dict[int, ItmItem]) -> None:
    """Writes the folder layout; the index last, so that a folder with an index is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    texts_of: dict[str, list[int]] = {}
    for text_id, item in items.items():
        texts_of.setdefault(item.image, []).append(text_id)
        (folder / f"{text_id:05d}.json").write_text(json.dumps(_row(item)))
    write_text(folder / INDEX_FILE, json.dumps(texts_of))


def write_tsv(path: Path, items: dict[int, ItmItem]) -> None:
    """Writes the table layout, at once or not at all."""
    table = StringIO(newline="")
    writer = csv.DictWriter(table, FIELDS, delimiter="\t")
    writer.writeheader()
    writer.writerows(_row(item) for item in items.values())
    write_text(path, table.getvalue())


def _row(item: ItmItem) -> dict[str, str]:
    values = (item.title, item.image, repr(list(item.neg_captions)), repr(list(item.neg_images)))
    return dict(zip(FIELDS, values, strict=True))
