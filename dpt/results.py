"""docs/results.md: each section is written by a command and says which."""

import re
import subprocess
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "docs/results.md"


def record_section(path: Path, name: str, command: str, text: str) -> None:
    """Prints a section with its command and commit, and puts it in place of the section of that name, or at the end."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True)
    body = f"`{command}`, on the code of commit {commit.stdout.strip() or 'unknown'}:\n\n{text}"
    print(body)
    block = f"<!-- begin {name} -->\n{body}\n<!-- end {name} -->"
    old = path.read_text() if path.exists() else "# Results\n"
    pattern = re.compile(rf"<!-- begin {re.escape(name)} -->.*?<!-- end {re.escape(name)} -->", re.DOTALL)
    new = pattern.sub(lambda _: block, old) if pattern.search(old) else f"{old.rstrip()}\n\n{block}\n"
    path.write_text(new)
