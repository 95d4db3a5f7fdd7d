#!/usr/bin/env bash
# dist.destroy_process_group() does not end the threads of Gloo as long as something refers to the group. torch.distributed.nn
# does, if it is imported after init_process_group: ten of its functions take the group of that moment as a default argument. PyTorch
# imports it itself, the first time that a process sends or receives, so that a program which never names it is concerned too. A
# process whose threads are left then may be ended by SIGABRT rather than with its own exit code. Imported before init_process_group,
# it refers to nothing, and the group is freed.
# Seen with torch 2.14.1 on Python 3.11, x86-64 Linux. Prints whether the group is left and fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat > "$folder/group.py" <<'PYTHON'
import gc
import os
import sys
import weakref

import torch
import torch.distributed as dist

if sys.argv[1] == "before":
    import torch.distributed.nn.functional
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
if sys.argv[1] == "after":
    import torch.distributed.nn.functional
group = weakref.ref(dist.group.WORLD)
dist.destroy_process_group()
gc.collect()
left = group() is not None
print(f"torch {torch.__version__}: imported {sys.argv[1]} init_process_group, the destroyed group is {'left' if left else 'freed'}")
sys.stdout.flush()
os._exit(left != (sys.argv[1] == "after"))
PYTHON
for when in before never after; do
  "$folder/venv/bin/python" "$folder/group.py" "$when"
done
