"""Damages one thing of a good input a case, and lets the project's commands read it, in a child process.

    python -m tests.fuzz --seed 0 --cases 600 [--only PART] [--json FILE]
    python -m tests.fuzz --seed 0 --case 17              # one alone; its folder is kept

A case passes where the command ends without a traceback, with the exit code that the damage demands and, where it
refuses, with one line "error: ...", and leaves the user's files as they were. The child is ended and started again
where it takes too long or too much memory. The exit code is 1 where a case failed.
"""

import argparse
import gc
import json
import os
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

SECONDS, MEMORY = 90, 2 * 2**30  # that a case may take, the memory beyond what the child had before
PER_CHILD = 150  # cases: what libraries keep would pass for what a case takes
ADDRESSES = 64 * 2**30  # of the child's memory in all, touched or not


def serve(seed: int, root: Path) -> int:
    """The child: reads numbers of cases, writes a line when one begins and one when it has ended."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from tests.fuzz.case import run_case
    from tests.fuzz.targets import all_targets

    targets = all_targets(seed)
    gc.freeze()  # what is imported by now need not be looked through after each case

    def tell(kind: str, content: object) -> None:
        replies.write(json.dumps({kind: content}) + "\n")

    tell("ready", [target.command for target in targets])
    for line in sys.stdin:
        result = run_case(targets, seed, int(line), root, begun=lambda result: tell("begun", vars(result)))
        tell("ended", vars(result))
    return 0


class Child:
    """The process that runs cases."""

    def __init__(self, seed: int, root: Path):
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        words = [sys.executable, "-m", "tests.fuzz", "--seed", str(seed), "--serve", str(root)]
        self.log = (root / "child.txt").open("ab+")
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            start_new_session=True,
        )
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)
        self.cases, self.parts = 0, self.read(300)["ready"]

    def read(self, seconds: float, memory: float = float("inf")) -> dict:
        """The next line. Raises TimeoutError, MemoryError, or EOFError where the child has died."""
        end = time.monotonic() + seconds
        while not self.selector.select(0.05):
            if time.monotonic() > end:
                raise TimeoutError(f"it took more than {seconds} s")
            if self.resident() > memory:
                raise MemoryError(f"it took more than {MEMORY / 2**30:g} GiB of memory")
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.log.seek(0)
            raise EOFError(f"the process died: {name}; {self.log.read().decode().strip()[-200:]!r}")
        return json.loads(line)

    def resident(self) -> int:
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):  # no Linux, or it has just died
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")

    def run(self, number: int) -> dict:
        """The case's result, also where the child did not live to tell it."""
        self.cases += 1
        self.process.stdin.write(f"{number}\n".encode())
        self.process.stdin.flush()
        result = {"number": number, "command": "", "target": "", "what": "", "words": [], "exit_code": None}
        try:
            told = self.read(600)  # good inputs are made first
            if "begun" in told:
                result = told["begun"]
                told = self.read(SECONDS, self.resident() + MEMORY)
            return told["ended"]
        except (TimeoutError, MemoryError, EOFError) as error:
            self.end()
            return result | {"problems": [str(error)]}

    def end(self) -> None:
        """Ends the process and what it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdin.close(), self.process.stdout.close(), self.log.close()

    @property
    def spent(self) -> bool:
        return self.process.poll() is not None or self.cases >= PER_CHILD


def run_cases(seed: int, numbers: list[int], only: str, root: Path) -> list[dict]:
    """The results of those cases whose command's name begins with `only`."""
    results, child = [], Child(seed, root)
    parts = child.parts
    try:
        for number in numbers:
            if not parts[number % len(parts)].startswith(only):
                continue
            if child.spent:
                child.end()
                child = Child(seed, root)
            began = time.monotonic()
            results.append(child.run(number) | {"seconds": round(time.monotonic() - began, 2)})
            if results[-1]["problems"]:
                print(f"case {number}: {results[-1]['problems'][0][:150]}", file=sys.stderr, flush=True)
    finally:
        child.end()
    return results


def summary(results: list[dict], seed: int) -> str:
    """A table by part, and every failure with what shows it again."""
    parts = sorted({result["command"] for result in results})
    cases = Counter(result["command"] for result in results)
    failed = Counter(result["command"] for result in results if result["problems"])
    lines = ["| part | cases | passed | failures |", "| --- | --- | --- | --- |"]
    lines += [f"| {part} | {cases[part]} | {cases[part] - failed[part]} | {failed[part]} |" for part in parts]
    total = sum(failed.values())
    lines.append(f"| all | {len(results)} | {len(results) - total} | {total} |")
    for result in results:
        if result["problems"]:
            what = f"{result['command']}: {result['target']}: {result['what']}"
            lines.append(
                f"\n--seed {seed} --case {result['number']}: {what.encode(errors='backslashreplace').decode()}"
            )
            lines += [f"    {problem}" for problem in result["problems"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the cases' order and damages (default: 0)")
    parser.add_argument("--cases", type=int, default=600, help="how many, from the first (default: 600)")
    parser.add_argument("--case", type=int, help="instead: this one alone, and keep its folder")
    parser.add_argument("--only", default="", metavar="PART", help="those of the cases whose part begins so")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        return serve(args.seed, args.serve)
    numbers = list(range(args.cases)) if args.case is None else [args.case]
    folder = Path(tempfile.mkdtemp(prefix="dpt-fuzz-"))
    try:
        results = run_cases(args.seed, numbers, args.only, folder)
    finally:
        if args.case is None:
            shutil.rmtree(folder, ignore_errors=True)
    if args.case is not None:
        print(f"{folder}: {results[0]['words']}")
    print(summary(results, args.seed))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(any(result["problems"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
