"""`ramet` and `python -m ramet`: the command line, which an interrupt ends quietly even while it is being imported."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from ramet.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
