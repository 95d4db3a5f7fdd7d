"""A contestant in a process of its own: python worker.py FILE SPEC

FILE is one of `contestants/`; its `prepare(spec)` returns a chunk of work, a function, and what is to be told of it.
SPEC is JSON. The process does `spec["warm_up"]` chunks, and writes a line of JSON: their seconds, and what is told.
From then on it does a chunk for each line that it reads, and writes its seconds. It ends with its input. It needs
nothing but Python, so that it runs with any checkout and in any environment.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any


def main(file: str, spec: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    chunk, told = runpy.run_path(file)["prepare"](spec)
    warm_up = [seconds(chunk) for _ in range(spec["warm_up"])]
    print(json.dumps({"warm_up": warm_up} | told), file=answers)
    for _ in sys.stdin:
        print(seconds(chunk), file=answers)


def seconds(chunk: Callable[[], object]) -> float:
    start = time.perf_counter()
    chunk()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
