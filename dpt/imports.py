"""Imports that take seconds. Imports nothing heavy."""

import contextlib
import gc
import sys


@contextlib.contextmanager
def heavy_imports():
    """Spares the imports within it the garbage collector, and it those imports, later and at exit: seconds of both."""
    if "diffusers" in sys.modules or not gc.isenabled():  # what a process has made since is not to be kept
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
