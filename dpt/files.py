"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Writes under a temporary name, then renames; the folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
