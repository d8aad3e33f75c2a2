"""Run the benches of validation and features, and print one table: what, must, aim, measured.

    python bench/features.py [--bundles N] [--peers PYTHON] [--write docs/performance-features.md]

`make bench-features` does, with the peers in an environment of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from figures import Figure, render

HERE = Path(__file__).parent


def figures_of(python: str, script: str, *arguments: str) -> list[Figure]:
    """Run one bench and give its figures."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parent / "src"),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [python, str(HERE / script), *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return [Figure(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> int:
    """Run all, print the table; exit 1 if a must is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundles", default="2000", help="Of the whole corpus; 76660 for all of it.")
    parser.add_argument("--peers", default="", help="Python of the peers' environment; without it they are left out.")
    parser.add_argument("--keep", default="", help="Where the whole corpus is made and kept.")
    asked = parser.parse_args()
    found = figures_of(sys.executable, "passes.py")
    if asked.peers:
        found += figures_of(asked.peers, "peers.py")
    found += figures_of(sys.executable, "tensors.py")
    found += figures_of(sys.executable, "whole.py", asked.bundles, *(["--keep", asked.keep] if asked.keep else []))
    print(render(found))
    return 0 if all(f.meets(f.must) for f in found) else 1


if __name__ == "__main__":
    sys.exit(main())
