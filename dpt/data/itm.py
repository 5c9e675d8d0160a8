"""Hard negatives for image-text matching, in the layouts that users have.

A folder holds `imgname2txtid.json`, {image file: [text ids]}, and one `{id:05d}.json` a text with `title`, `filepath`,
`neg_caption` and `neg_image`, the last two as Python-literal strings of lists. A `.tsv` holds the same four columns.
"""

import ast
import csv
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dpt.data.coco import read_json

INDEX_FILE = "imgname2txtid.json"
FIELDS = ("title", "filepath", "neg_caption", "neg_image")


@dataclass(frozen=True)
class ItmItem:
    """A caption, its image's file name, and captions and image files that are similar but not true of it."""

    title: str
    image: str
    neg_captions: tuple[str, ...]
    neg_images: tuple[str, ...]


class ItmNegatives:
    """Items by text id, read when asked for (a folder) or at once (a `.tsv`).

    Raises:
        ValueError: neither layout there, or a file that does not hold what it should; it is named.
    """

    def __init__(self, path: Path):
        self.path, self._rows = path, None
        if path.is_dir():
            index = read_json(path / INDEX_FILE)
            if not isinstance(index, dict) or not all(
                isinstance(ids, list) and all(isinstance(i, int) for i in ids) for ids in index.values()
            ):
                raise ValueError(f"{path / INDEX_FILE} does not map image files to lists of text ids")
            self.texts_of = index
            self.ids = sorted(i for ids in index.values() for i in ids)
        else:
            self._rows, self.texts_of = _read_tsv(path), {}
            self.ids = list(range(len(self._rows)))
            for i, row in enumerate(self._rows):
                self.texts_of.setdefault(row["filepath"], []).append(i)
        if not self.ids:
            raise ValueError(f"{path} holds no items")
        self.item = lru_cache(maxsize=4096)(self._item)

    def __len__(self) -> int:
        return len(self.ids)

    def _item(self, text_id: int) -> ItmItem:
        where = self.path / f"{text_id:05d}.json" if self._rows is None else f"{self.path}, row {text_id + 1}"
        row = read_json(where) if self._rows is None else self._rows[text_id]
        try:
            lists = [_literal_list(row[name]) for name in FIELDS[2:]]
            return ItmItem(row["title"], row["filepath"], *lists)
        except (KeyError, TypeError, ValueError, SyntaxError) as error:
            raise ValueError(f"{where} is no item of hard negatives: {error!r}") from error


def _literal_list(text: str) -> tuple[str, ...]:
    values = ast.literal_eval(text)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{text[:60]!r} is no list of strings")
    return tuple(values)


def _read_tsv(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(2**24)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            missing = [name for name in FIELDS if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
            return list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error


def write_items(folder: Path, items: dict[int, ItmItem]) -> None:
    """Writes the folder layout; the index last, so that a folder with an index is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    texts_of: dict[str, list[int]] = {}
    for text_id, item in items.items():
        texts_of.setdefault(item.image, []).append(text_id)
        (folder / f"{text_id:05d}.json").write_text(json.dumps(_row(item)))
    (folder / INDEX_FILE).write_text(json.dumps(texts_of))


def write_tsv(path: Path, items: dict[int, ItmItem]) -> None:
    """Writes the table layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, delimiter="\t")
        writer.writeheader()
        writer.writerows(_row(item) for item in items.values())


def _row(item: ItmItem) -> dict[str, str]:
    values = (item.title, item.image, repr(list(item.neg_captions)), repr(list(item.neg_images)))
    return dict(zip(FIELDS, values, strict=True))
