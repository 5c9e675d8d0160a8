"""`evaluate.py align`: scores of how well pictures show their prompts.

    python evaluate.py align outputs/evaluation/base outputs/evaluation/dpt --metrics oracle

A folder is an arm's, with its `metadata.jsonl`, or holds pictures named as T2I-CompBench names them, <prompt>_<6
digits>.png, in itself or in samples/. The numbers may run on over the prompts, or begin anew with each. Scores go to
`<metric>.jsonl` in the folder, a line a picture, with the hashes of picture and scorer. A score with the same hashes is
not computed again. `oracle` says correct, misaligned or malformed (shapes prompts only); `shapes-clip` is the
cosine by the small CLIP of the shapes world; `clip` the CLIP score by OpenCLIP; `blip` BLIP's matching and contrastive
heads. The latter two read weights that you put into ckpt/.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path
from typing import Any, Required, TypedDict

import numpy as np
from tqdm import tqdm

from dpt.evaluation.flags import METRICS, judge_options
from dpt.evaluation.judges import Judge, make_judge
from dpt.files import append_line, read_json_lines
from dpt.images import METADATA_FILE, read_image, read_metadata, read_records
from dpt.shapes.oracle import Label

COMPBENCH_NAME = re.compile(r"(.+)_(\d{6})", re.DOTALL)
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
Box = tuple[str, float, float, float, float]


class Score(TypedDict, total=False):
    """A line of a file of scores. Its other keys are names of metrics, their values numbers."""

    file: Required[str]
    sha256: Required[str]
    scorer: str
    label: Label
    reason: str
    objects: list[Box]


def run(args: argparse.Namespace) -> dict:
    """Scores the pictures that have no score yet; returns the number of new scores by folder and metric."""
    judges = [make_judge(metric, **judge_options(args)) for metric in args.metrics]
    return score_folders(args.folders, judges, batch_size=args.batch_size)


def score_folders(folders: list[Path], judges: list[Judge], *, batch_size: int = 64) -> dict:
    """Adds the missing scores of each folder; returns their number by folder and metric.

    Raises:
        ValueError: a folder without pictures, a picture that cannot be read, or a score that is no number.
    """
    for folder in folders:
        for note in notes(folder):
            print(f"{folder}: {note}", file=sys.stderr)
    return {str(folder): {judge.name: score(folder, judge, batch_size) for judge in judges} for folder in folders}


def _judged_alone(folder: Path, judge: Judge, image, record: dict) -> None:
    """Judges one picture. Raises ValueError naming it and its prompt where that fails."""
    try:
        judge.metric([image], [record["prompt"]])
    except ValueError as error:
        raise ValueError(
            f"{folder / record['file']} of the prompt {record['prompt']!r}: {error}; leave that prompt out, or name "
            "other --metrics"
        ) from error


def score(folder: Path, judge: Judge, batch_size: int) -> int:
    """Adds the missing scores of a folder and returns their number."""
    records = pictures(folder)
    path, hashes = folder / f"{judge.name}.jsonl", file_hashes(folder, records)
    known = {(r["file"], r["sha256"], r.get("scorer")) for r in score_lines(path)}
    missing = [r for r in records if (r["file"], hashes[r["file"]], judge.fingerprint) not in known]
    for start in tqdm(range(0, len(missing), batch_size), desc=f"{folder.name} {judge.name}", mininterval=2):
        batch = missing[start : start + batch_size]
        images = [read_image(folder / record["file"]) for record in batch]
        try:
            results = judge.metric(images, [record["prompt"] for record in batch])
        except ValueError:
            for image, record in zip(images, batch, strict=True):  # which of them it is
                _judged_alone(folder, judge, image, record)
            raise
        for record, result in zip(batch, results, strict=True):
            bad = [key for key, value in result.items() if isinstance(value, float) and not np.isfinite(value)]
            if bad:
                raise ValueError(f"{folder / record['file']}: {judge.name} gives no number for {bad[0]}")
            identity = {"file": record["file"], "sha256": hashes[record["file"]], "scorer": judge.fingerprint}
            append_line(path, identity | result)
    return len(missing)


def file_hashes(folder: Path, records: list[dict]) -> dict[str, str]:
    """SHA-256 of the records' files."""
    return {r["file"]: hashlib.sha256((folder / r["file"]).read_bytes()).hexdigest() for r in records}


def score_lines(path: Path) -> list[dict]:
    """The lines of a file of scores, with their figures; an empty list without a file.

    Raises:
        ValueError: a line does not fit `Score`; file, line and field are named.
    """
    if not path.exists():
        return []
    read_json_lines(path, Score)
    lines = read_json_lines(path, dict[str, Any])
    for n, line in enumerate(lines, 1):
        for key, value in line.items():
            if key not in Score.__annotations__ and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{path}, record {n}: {key}: expected a number, got {value!r:.40}")
    return lines


def read_scores(folder: Path, hashes: dict[str, str]) -> dict[str, dict[str, dict]]:
    """The newest score of each file by metric and file; scores of files that have changed since are left out."""
    paths = [path for path in sorted(folder.glob("*.jsonl")) if path.name != METADATA_FILE]
    found = {}
    for path in paths:
        if path.stem.partition(".")[0] in METRICS:
            lines = [line for line in score_lines(path) if hashes.get(line["file"]) == line["sha256"]]
            found[path.stem] = {line["file"]: line for line in lines}
        else:
            print(f"note: {path} is of no metric of `align`, and is passed over", file=sys.stderr)
    return found


def pictures(folder: Path) -> list[dict]:
    """The folder's pictures by its metadata or, without one, by their names: at least file, prompt, category, seed.

    Raises:
        ValueError: there are no pictures, or the metadata cannot be read or names pictures that are missing.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there, or no folder")
    records = read_records(folder)
    there = [record for record in records if (folder / record["file"]).is_file()]
    drawn, files = {(record["prompt"], record["seed"]) for record in there}, {record["file"] for record in there}
    lost = [r["file"] for r in records if r["file"] not in files and (r["prompt"], r["seed"]) not in drawn]
    if lost:
        raise ValueError(f"{folder}: {len(lost)} pictures are missing, such as {lost[0]}; generate them again")
    if there:
        return [{"category": "all"} | record for record in there]
    records = _named_pictures(folder)
    if not records:
        raise ValueError(
            f"{folder} holds no pictures: neither a {METADATA_FILE} nor files named <prompt>_<6 digits>.png"
        )
    return records


def _named_pictures(folder: Path) -> list[dict]:
    """Pictures named as T2I-CompBench names them; a picture's seed is its place among its prompt's by their numbers."""
    numbers: dict[str, list[tuple[int, str]]] = {}
    for sub in (folder, folder / "samples"):
        for path in sorted(sub.glob("*.png")):
            if match := COMPBENCH_NAME.fullmatch(path.stem):
                numbers.setdefault(match[1], []).append((int(match[2]), str(path.relative_to(folder))))
    return [
        {"file": file, "prompt": prompt, "category": "all", "seed": seed}
        for prompt, files in numbers.items()
        for seed, (_, file) in enumerate(sorted(files))
    ]


def notes(folder: Path) -> list[str]:
    """Remarks on a folder's pictures: how their files are numbered, and which are passed over."""
    files, found = [Path(record["file"]) for record in pictures(folder)], []
    numbers = [(file.parent, match[2]) for file in files if (match := COMPBENCH_NAME.fullmatch(file.stem))]
    if numbers:
        run_on = len(set(numbers)) == len(numbers)
        found.append(
            "file numbers run on over the prompts, as T2I-CompBench's own scorers read them"
            if run_on
            else "file numbers begin anew with each prompt; T2I-CompBench's own scorers would take them for others'"
        )
    places = {file.parent for file in files} | {Path("samples")}
    beside = [path.relative_to(folder) for place in sorted(places) for path in sorted((folder / place).glob("*"))]
    if passed := [path for path in beside if path.suffix.lower() in ENDINGS and path not in files]:
        lack = f"no record in {METADATA_FILE}" if read_metadata(folder) else "not the name <prompt>_<6 digits>.png"
        found.append(f"{len(passed)} pictures are passed over, such as {passed[0]}: they have {lack}")
    return found
