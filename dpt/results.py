"""docs/results.md: each section is written by a command and says which."""

import re
import subprocess
from pathlib import Path

from dpt.files import write_text

RESULTS = Path(__file__).resolve().parents[1] / "docs/results.md"


def record_section(path: Path, name: str, command: str, text: str) -> None:
    """Puts a section, with its command and commit, in place of the section of that name, or at the end; says where."""
    describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(describe, cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip() or "unknown"
    body = f"`{command}`, recorded at commit {commit}:\n\n{text}"
    block = f"<!-- begin {name} -->\n{body}\n<!-- end {name} -->"
    old = path.read_text() if path.exists() else "# Results\n"
    pattern = re.compile(rf"<!-- begin {re.escape(name)} -->.*?<!-- end {re.escape(name)} -->", re.DOTALL)
    new = pattern.sub(lambda _: block, old) if pattern.search(old) else f"{old.rstrip()}\n\n{block}\n"
    write_text(path, new)
    print(f"recorded in {path}, section {name!r}")
