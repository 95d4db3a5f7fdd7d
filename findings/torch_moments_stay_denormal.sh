#!/usr/bin/env bash
# The first moment of a weight that gets no gradient any more, such as that of a pixel which is lit in few pictures, or of a dead
# unit, does not decay to 0. In float32 it stops at the fourth denormal number, 5.6e-45, since 0.9 times it rounds to itself: so for
# torch.optim.Adam and for SGD with momentum. Processors are slow with denormals: an epoch of Adam on MNIST (784-128-128-10, two
# threads, Intel with AVX-512) took 0.61 s, and 0.46 s with torch.set_flush_denormal(True).
# That setting is the calling thread's alone, and other threads have it if it was set before PyTorch started them: here, after a
# first operation with two threads, one half of a tensor keeps its denormals.
# Seen with torch 2.14.1 on Python 3.11, x86-64 Linux. Prints what is left and fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat > "$folder/moments.py" <<'PYTHON'
import sys

import numpy as np
import torch

torch.set_num_threads(2)
weights = [torch.nn.Parameter(torch.ones(8)) for _ in range(2)]
rules = [torch.optim.Adam(weights[:1], lr=1e-3), torch.optim.SGD(weights[1:], lr=1e-3, momentum=0.9)]
for step in range(5000):
    for weight, rule in zip(weights, rules):
        weight.grad = torch.full_like(weight, float(step == 0))
        rule.step()
left = [rules[0].state[weights[0]]["exp_avg"][0].item(), rules[1].state[weights[1]]["momentum_buffer"][0].item()]
print(f"torch {torch.__version__}: first moments after 5000 steps: Adam {left[0]:.2g}, SGD {left[1]:.2g}")
assert left == [4 * 2**-149] * 2, left

denormal = torch.from_numpy(np.ones(1 << 20, np.int32)).view(torch.float32)  # the smallest one
if sys.argv[1] == "late":
    denormal.add(denormal)  # by two threads
torch.set_flush_denormal(True)
kept = denormal.mul(1.0).view(torch.int32).count_nonzero().item()
print(f"set {sys.argv[1]}: {kept} of {denormal.numel()} denormals are left")
assert kept == {"early": 0, "late": denormal.numel() // 2}[sys.argv[1]], kept
PYTHON
for when in early late; do
  OMP_NUM_THREADS=2 "$folder/venv/bin/python" "$folder/moments.py" "$when"
done
