"""Kill a sweep again and again: python -m scripts.benchmarks.kill_a_sweep [--kills 30] [--launcher basic]

A sweep of twelve cells on the digits is started, and one of its processes is ended by SIGKILL after a random time, so
many times; then it is left to end. Its runs and its table must be those of a sweep that nothing has disturbed, bit for
bit, but for the seconds. Exits with 1 if they are not.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import pandas as pd
import psutil

ROOT = Path(__file__).parents[2]
SWEEP = [
    *("experiment=digits_shallow", "optimizer=online_block_admm", "setting=tuned", "seeds=[0,1]", "iterations=8"),
    *("optimizer.theta_step=1e-3,3e-3,1e-2", "optimizer.beta=0.5,1", "optimizer.batch_size=64,128"),
    *("threads=1", "checkpoint_seconds=0"),
]
CELLS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--launcher", default="basic", help="basic, stacked or joblib")
    parser.add_argument("--seed", type=int, default=0, help="of the times and victims")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        places = (Path(folder) / str(number) for number in count())
        undisturbed, place = next(places), next(places)
        start = time.monotonic()
        if code := sweep(undisturbed, options.launcher).wait():
            sys.exit(f"error: the sweep that nothing disturbs: exit {code}")
        length = time.monotonic() - start
        chance, differences, kills = random.Random(options.seed), list[str](), 0
        while kills < options.kills:
            victim = kill(sweep(place, options.launcher), chance.uniform(0.2, 0.7) * length, chance)
            finished = len(histories(place))
            if victim is not None:
                kills += 1
                print(f"kill {kills}: {victim}, {finished} of {CELLS} runs finished", flush=True)
            elif finished < CELLS:
                break  # it has failed, as `finish` will
            if finished == CELLS:  # go on with another sweep
                differences += finish(place, options.launcher, undisturbed)
                place = next(places)
        differences += finish(place, options.launcher, undisturbed)
    print("\n".join(differences or ["the same, bit for bit"]))
    sys.exit(1 if differences else 0)


def finish(place: Path, launcher: str, undisturbed: Path) -> list[str]:
    """Let a killed sweep end. Returns in words what differs from the undisturbed one."""
    if code := sweep(place, launcher).wait():
        return [f"the last launch: exit {code}"]
    return compare(undisturbed, place)


def sweep(folder: Path, launcher: str) -> psutil.Popen:
    """Start the sweep, and return its process."""
    command = [sys.executable, str(ROOT / "run.py"), "-m", *SWEEP, f"hydra/launcher={launcher}", f"outputs={folder}"]
    return psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)


def kill(process: psutil.Popen, seconds: float, chance: random.Random) -> str | None:
    """Kill the launcher or one of its workers, drawn at random, after so many seconds; then kill the rest. Returns in
    words which was drawn; None if the sweep had ended."""
    try:
        process.wait(seconds)
        return None
    except psutil.TimeoutExpired:
        family = [process, *process.children(recursive=True)]
        victim = chance.choice(family)
        victim.kill()
        if victim != process:
            process.wait()  # it finds its worker dead
        for other in family:
            if other.is_running():
                other.kill()
        process.wait()
        return f"the {'launcher' if victim == process else 'worker'} after {seconds:.1f} s"


def histories(folder: Path) -> dict[str, pd.DataFrame]:
    """Return the histories of the finished runs by folder, without the seconds."""
    found = sorted(folder.glob("runs/*/*/history.csv"))
    return {path.parent.name: pd.read_csv(path).drop(columns="seconds") for path in found}


def table(folder: Path) -> str:
    """Return the table of the newest launch that has ended."""
    return max(folder.glob("logs/*/*/*.csv"), key=lambda path: path.stat().st_mtime).read_text(encoding="utf-8")


def compare(undisturbed: Path, killed: Path) -> list[str]:
    """Return in words what differs."""
    whole, found = histories(undisturbed), histories(killed)
    if whole.keys() != found.keys() or len(whole) != CELLS:
        return [f"runs: {len(whole)} undisturbed, {len(found)} killed, {len(whole.keys() & found.keys())} in common"]
    changed = [f"{name}: another history" for name in whole if not whole[name].equals(found[name])]
    return changed + (["another table"] if table(undisturbed) != table(killed) else [])


if __name__ == "__main__":
    main()
