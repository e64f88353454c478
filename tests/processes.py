"""Child processes of tests."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def child(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process as a terminal starts it, which does not outlive the block.

    A shell has those that it starts in the background, and their children, ignore SIGINT: here it interrupts, wherever the tests run.
    """
    process = subprocess.Popen(command, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
