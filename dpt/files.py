"""Files: written whole or not at all, and read with their content checked against a schema.

A schema is a `msgspec.Struct`, or a type built of structs, lists and dicts. What does not fit it is a ValueError of one
line that names the file, the record and the field.
"""

import codecs
import contextlib
import json
import mmap
import os
import re
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")


@contextlib.contextmanager
def replacing(path: str | Path):
    """A temporary name beside `path`: the file written there takes its place when the block ends without an error.

    The folder is made where it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without its byte-order mark. Raises ValueError naming the file where it has none."""
    try:
        return Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ValueError(f"{path} cannot be read: {reason}") from error


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file without UTF-8's byte-order mark. Raises ValueError naming the file."""
    try:
        return Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def text_lines(text: str) -> list[str]:
    """The lines of a text without their ends. A line ends with "\\n" alone, unlike in `str.splitlines`."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def check_text(name: str, text: str) -> str:
    """The text. Raises ValueError where it is no UTF-8, as some bytes of a command line are not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is {ascii(text)[:80]}, which is no UTF-8 text") from error
    return text


def decode(text: str | bytes, schema: type[T], where: str) -> T:
    """JSON as an instance of the schema. Raises ValueError that begins with `where` and names the field."""
    try:
        return msgspec.json.decode(text, type=schema)
    except RecursionError as error:
        raise ValueError(f"{where}: nested too deeply") from error
    except (msgspec.DecodeError, UnicodeError) as error:  # a ValidationError is a DecodeError
        raise ValueError(f"{where}: {in_words(str(error))}") from error


def in_words(message: str) -> str:
    """msgspec's message, field first: "Expected `str`, got `int` - at `$.title`" -> "title: expected str, ..."."""
    reason, _, path = message.partition(" - at `$")
    path = re.sub(r"\[\.\.\.\]", "[]", path.rstrip("`")).lstrip(".")
    reason = reason.replace("`", "")
    reason = reason.replace("Expected", "expected").replace("Object missing", "object is missing")
    return f"{path}: {reason}" if path else reason


def read_json(path: str | Path, schema: type[T]) -> T:
    """A JSON file as an instance of the schema. Raises ValueError naming file and field."""
    return decode(read_text(path), schema, str(path))


def read_json_lines(path: str | Path, schema: type[T]) -> list[T]:
    """The records of a file of JSON lines; blank lines are passed over, and so is a last line that a kill cut short.

    Raises:
        ValueError: a line that does not fit the schema; it names file, line and field.
    """
    lines = read_bytes(path).split(b"\n")
    if is_cut_short(lines[-1]):
        lines.pop()
    try:
        return [decode(line, schema, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    except ValueError as error:
        raise ValueError(f"{error}; mend that line, or remove it") from error


def is_cut_short(line: bytes) -> bool:
    """Whether a line without its end is the beginning of a record, as a kill leaves it."""
    try:
        msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeError) as error:
        begun = line.lstrip().startswith(b"{") and line.count(b"{") > line.count(b"}")
        return begun and ("truncated" in str(error) or "invalid number" in str(error))
    except RecursionError:
        pass
    return False


def append_line(path: Path, record: dict) -> None:
    """Appends a record to a file of JSON lines, in one write; an earlier record that a kill cut short is removed."""
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    with path.open("ab") as file:
        with contextlib.suppress(ImportError, OSError):  # a system, or a file system, without such locks
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # else another process's record could be taken for one cut short
        rest = _last_line(path)
        if is_cut_short(rest):
            file.truncate(path.stat().st_size - len(rest))
        elif rest:
            line = b"\n" + line
        file.write(line)


def _last_line(path: Path) -> bytes:
    """The bytes after the last line end of a file."""
    if path.stat().st_size == 0:
        return b""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content[content.rfind(b"\n") + 1 :]
