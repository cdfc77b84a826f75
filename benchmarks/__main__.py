"""The benchmarks in one command: ``python -m benchmarks --help``, from the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

# scripts, not a package: they import each other by name
sys.path.insert(0, str(Path(__file__).resolve().parent))

from suite.runner import main

if __name__ == "__main__":
    sys.exit(main())
