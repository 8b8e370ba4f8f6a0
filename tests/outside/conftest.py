"""Distributions of outside authors, written from the documents; their sources are found as if they were installed."""

import sys
from pathlib import Path

for source in Path(__file__).parent.glob("*/src"):
    sys.path.insert(0, str(source))
