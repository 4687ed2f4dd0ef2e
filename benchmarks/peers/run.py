"""Runs `bench.py`, from a checkout, by its path."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, whose modules must not hide the peers' own.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from peers.bench import main

    raise SystemExit(main())
