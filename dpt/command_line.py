"""Command lines: the parser, types of flags, errors in one line. Imports nothing heavy."""

import argparse
import ast
import contextlib
import errno
import functools
import gc
import importlib.util
import sys

from dpt.bounds import Bounds


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, which says what is wrong in one line; flags cannot be abbreviated."""

    def __init__(self, *args, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("allow_abbrev", False)
        module = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")
        if not args and module.startswith("dpt."):  # by python -m, where argparse would say __main__.py
            options.setdefault("prog", f"python -m {module.removesuffix('.__main__')}")
        super().__init__(*args, **options)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """The arguments; of a command with `overrides`, settings (key=value) may stand behind flags too."""
        found, rest = self.parse_known_args(args, namespace)
        if "overrides" in found:
            found.overrides += [word for word in rest if not word.startswith("-")]
            rest = [word for word in rest if word.startswith("-")]
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found

    def error(self, message: str):
        """Ends the program with exit code 2 and one line."""
        self.exit(2, f"error: {message} ({self.prog} --help lists every flag)\n")


def number(kind: type, **limits: float):
    """An argparse type: an int or float within `Bounds(**limits)`."""
    bounds = Bounds(**limits)

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or value not in bounds:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}; it must be {str(bounds).replace('a finite number', noun)}")
        return value

    return parse


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a CPU or an accelerator."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    return known or any(text in str(error) for text in ("can't allocate memory", "out of memory"))


def fail(error: object) -> int:
    """Prints one line of an error for a person, and returns the exit code of bad input, 2."""
    text = str(error).strip() or repr(error)
    if "Traceback (most recent call last)" in text:  # of a reading process, whose last line is the error
        text = text.splitlines()[-1].removeprefix("ValueError: ")
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return 2


def one_line_errors(interrupted: str = "", *, out_of_memory: str = "", kept: str = ""):
    """A decorator of a command line's main function: it returns the exit code, and says errors in one line.

    Bad input is 2, an interrupt 130. Errors of the program itself pass through.

    Args:
        interrupted: how to go on after Ctrl-C.
        out_of_memory: settings that take less memory.
        kept: where finished work is; it follows errors of files and memory.
    """

    def joined(*parts: str) -> str:
        return "; ".join(filter(None, parts))

    def decorate(main):
        @functools.wraps(main)
        def guarded(*args, **options) -> int:
            try:
                return main(*args, **options)
            except OSError as error:
                return fail(joined(_of_file(error), kept))
            except (ValueError, FloatingPointError) as error:
                return fail(error)
            except KeyboardInterrupt:
                print(f"\n{joined('interrupted', interrupted)}", file=sys.stderr)
                return 130
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                return fail(joined(f"out of memory{out_of_memory and f': {out_of_memory}'}", kept))

        return guarded

    return decorate


ELSEWHERE, ROOM = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR), (errno.ENOSPC, errno.EDQUOT)


def _of_file(error: OSError) -> str:
    """The text of an error of the file system: the file, the fault and, where it is known, the remedy."""
    names = [name for name in (error.filename2, error.filename) if name is not None]
    if not names or error.strerror is None:
        return str(error)
    advice = "; name another place" if error.errno in ELSEWHERE else "; make room there" if error.errno in ROOM else ""
    return f"{names[0]}: {error.strerror}{advice}"


def docstring_of(module: str) -> str:
    """The docstring of a module, read from its source without running it."""
    spec = importlib.util.find_spec(module)
    return ast.get_docstring(ast.parse(spec.loader.get_source(module))) or ""


@contextlib.contextmanager
def heavy_imports():
    """Turns the garbage collector off during imports, and keeps their objects out of its later runs: saves seconds."""
    if "diffusers" in sys.modules or not gc.isenabled():  # what a process has made since is not to be kept
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
