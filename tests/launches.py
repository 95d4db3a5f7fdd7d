"""Launches of the suite that are cut short."""

import signal
import subprocess
import time
from pathlib import Path


def kill_when_there(command: list[str], folder: Path, pattern: str) -> None:
    """Start a command, and end it by SIGKILL as soon as a file of that pattern is in the folder."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)) and time.monotonic() < deadline:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
