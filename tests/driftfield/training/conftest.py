"""Puts this folder on the import path, for the processes that the tests start and kill."""

import sys
from pathlib import Path

import driftfield.training  # noqa: F401 - before pytest runs a module's doctests: it would import that module twice

sys.path.insert(0, str(Path(__file__).parent))
