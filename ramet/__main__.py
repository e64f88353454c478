"""`ramet` and `python -m ramet`: the command line. A Ctrl-C while it is being imported, or when it is done, ends it without a word."""

from __future__ import annotations

import signal


def main() -> None:
    """Entry point of the installed command."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if not ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ramet.cli.main import main as run

    try:
        run()
    finally:
        if not ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    main()
