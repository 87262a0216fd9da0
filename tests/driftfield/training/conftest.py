"""Puts this folder on the import path, for the processes that the tests start and kill."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
