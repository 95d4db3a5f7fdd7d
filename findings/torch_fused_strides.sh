#!/usr/bin/env bash
# On a CPU the fused optimizers read a gradient in the order of its memory, not by its strides: a gradient that is a transposed
# or channels-last tensor, assigned to `.grad`, moves the wrong entries of the parameter, without an error. The plain
# implementations (fused=False) are right. Backward passes of PyTorch itself lay out `.grad` as the parameter; tensors that
# `torch.autograd.grad` returns, which methods other than back-propagation use, need not be laid out so.
# Seen with torch 2.14.1 on Python 3.11, for SGD and Adam. Prints what is seen and fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch

gradient = torch.tensor([[1.0, -1.0], [2.0, -2.0], [3.0, -3.0]]).t()  # [2, 3]: positive in the first row
for kind in (torch.optim.SGD, torch.optim.Adam):
    signs = {}
    for fused in (False, True):
        parameter = torch.nn.Parameter(torch.zeros(2, 3))
        parameter.grad = gradient
        kind([parameter], lr=1.0, fused=fused).step()
        signs[fused] = parameter.detach().sign().tolist()
        print(f"{kind.__name__}, fused={fused}: {parameter.detach().tolist()}")
    assert signs[False] == [[-1.0] * 3, [1.0] * 3], "the plain implementation is no longer right"
    assert signs[True] == [[-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]], "the fused kernel looks at strides now"
PYTHON
