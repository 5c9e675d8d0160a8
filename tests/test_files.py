"""Typed reading of text files, and bounds of numbers."""

import argparse
from dataclasses import dataclass

import msgspec
import pytest

from dpt.bounds import bounded, check_bounds, one_of
from dpt.command_line import ArgumentParser, number
from dpt.files import check_text, read_json, read_json_lines, text_lines, write_text


class Record(msgspec.Struct):
    file: str
    seed: int = 0
    scores: list[float] = []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file": null}', "file: expected str, got null"),
        ('{"file": "a", "scores": [1, "x"]}', r"scores\[1\]: expected float, got str"),
        ('{"seed": 3}', "missing required field file"),
        ("[" * 100_000, "nested too deeply|expected object"),
        ('{"file": "a", "scores": [NaN]}', "malformed"),
        ('{"file": "\\ud800"}', "truncated"),
        ('{"file": "a", "seed": %s}' % ("9" * 5000), "out of range"),
        ("", "truncated"),
    ],
)
def test_what_does_not_fit_the_schema_is_named(tmp_path, text, message):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"record.json: .*({message})"):
        read_json(path, Record)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + b'{"file": "a"}')
    assert read_json(tmp_path / "a.json", Record) == Record("a")


def test_a_record_ends_with_a_line_feed_alone(tmp_path):
    path = tmp_path / "lines.jsonl"
    write_text(path, '{"file": "a\u2028b\x85c"}\r\n\n{"file": "d"}\n{"file": "cut sh')
    assert [record.file for record in read_json_lines(path, Record)] == ["a\u2028b\x85c", "d"]
    assert text_lines("a\u2028b\r\nc\n\nd") == ["a\u2028b", "c", "", "d"]
    write_text(path, '{"file": "a"}\n{"file": "\\ud800"}')  # whole, but no text
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 2: "):
        read_json_lines(path, Record)
    write_text(path, '{"file": "a"}\n{"file": "cut sh\n{"file": "b"}\n')
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 2: "):
        read_json_lines(path, Record)


@dataclass
class Settings:
    steps: int = bounded(50, at_least=1, at_most=500)
    gamma: float | None = bounded(None, above=0)
    betas: list[float] = bounded([0.9, 0.999], at_least=0, below=1)
    on_nan: str = one_of("raise", "raise", "skip")

    def __post_init__(self):
        check_bounds(self, "optim.")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "optim.steps is 0; it must be a whole number at least 1 and at most 500"),
        ({"gamma": float("inf")}, "optim.gamma is inf; it must be a finite number above 0"),
        ({"betas": [0.9, 1.0]}, "optim.betas is 1.0; it must be a finite number at least 0 and below 1"),
        ({"on_nan": "stop"}, "optim.on_nan is 'stop'; it must be raise or skip"),
    ],
)
def test_bounds_of_settings(wrong, message):
    Settings()
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


@pytest.mark.parametrize("value", ["0", "501", "nan", "1e3", "x", ""])
def test_bounds_of_flags_are_one_line_and_exit_code_2(capsys, value):
    parser = ArgumentParser(prog="draw.py")
    parser.add_argument("--steps", type=number(int, at_least=1, at_most=500))
    assert parser.parse_args(["--steps", "500"]) == argparse.Namespace(steps=500)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--steps", value])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert "--steps" in error
    assert "a whole number at least 1 and at most 500" in error


def test_text_that_cannot_be_written_is_named():
    assert check_text("--prompt", "a 🙂") == "a 🙂"
    with pytest.raises(ValueError, match=r"--prompt is 'a \\udcff', which is no UTF-8 text"):
        check_text("--prompt", "a \udcff")


def test_an_integer_beyond_floats_is_out_of_bounds():
    with pytest.raises(argparse.ArgumentTypeError, match="at most 500"):
        number(int, at_least=1, at_most=500)("1" + "0" * 400)
