#!/usr/bin/env bash
# A deep copy of a parametrised module is not its own: taking the parametrisation off the copy breaks the original, whose
# weight is then no attribute any more. `torch.nn.utils.parametrize` makes a class for the module, keeps the weight as a
# property of that class, and `copy.deepcopy` lets both modules share it. So weights of copies, one per seed or replica,
# cannot be drawn by way of `remove_parametrizations`.
# Seen with torch 2.14.1 on Python 3.11, for weight_norm, spectral_norm and orthogonal. Prints what is seen and fails if that
# changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import copy

from torch import nn
from torch.nn.utils import parametrizations, parametrize

for make in (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal):
    module = make(nn.Linear(4, 3))
    twin = copy.deepcopy(module)
    assert module.weight.shape == (3, 4)
    parametrize.remove_parametrizations(twin, "weight")
    try:
        module.weight
    except AttributeError as error:
        print(f"{make.__name__}: {error}")
    else:
        raise SystemExit(f"{make.__name__}: the original has kept its weight")
PYTHON
