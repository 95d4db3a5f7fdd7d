#!/usr/bin/env bash
# The argument `timeout` of torch.distributed.monitored_barrier (Gloo) binds rank 0 alone. Another rank that comes to the barrier
# without rank 0 waits as long as the group's own timeout, which is half an hour by default: here 1 second is asked for, and 6,
# the group's, pass. A program in which one rank fails alone is ended in time only if the barrier has a group of its own, made
# with a short timeout by dist.new_group.
# Seen with torch 2.14.1 on Python 3.11. Prints the seconds that both ranks wait and fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat > "$folder/barrier.py" <<'PYTHON'
import time
from datetime import timedelta

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
for first in (0, 1):  # the rank that comes to the barrier while the other one does something else
    group = dist.new_group(timeout=timedelta(seconds=6))
    dist.barrier()
    start = time.monotonic()
    if rank == first:
        try:
            dist.monitored_barrier(group, timeout=timedelta(seconds=1))
        except RuntimeError:
            waited = time.monotonic() - start
            print(f"torch {torch.__version__}: rank {rank} asked for 1 s and waited {waited:.1f} s", flush=True)
            assert (waited < 4) == (rank == 0) and waited < 20
        else:
            raise AssertionError("the other rank did not come")
    else:
        time.sleep(12)
    dist.barrier()
PYTHON
"$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node=2 "$folder/barrier.py"
