#!/usr/bin/env bash
# torch.fx: a tracer may be told to take the functions of a module as nodes, `Tracer(autowrap_modules=(functional,))`.
# Once the graph of such a trace has become a GraphModule, every later trace of the process fails, also of modules that
# have nothing to do with it: the code that PyTorch generates registers the function by its dotted name, and the next
# trace looks that up as a global variable (KeyError: 'torch.nn.functional.interpolate'). Without the entry "is_wrapped"
# of the node's `meta` nothing is registered, and later traces work.
# Seen with torch 2.14.1 on Python 3.11. Prints what happens and fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat > "$folder/trace.py" <<'PYTHON'
import sys

from torch import fx, nn
from torch.nn import functional


class Larger(nn.Module):
    def forward(self, x):
        return functional.interpolate(x, scale_factor=2)


graph = fx.Tracer(autowrap_modules=(functional,)).trace(Larger())
if sys.argv[1] == "mended":
    for node in graph.nodes:
        node.meta.pop("is_wrapped", None)
fx.GraphModule(Larger(), graph)
try:
    fx.symbolic_trace(nn.Linear(1, 1))
    print("the next trace works")
except KeyError as error:
    print(f"the next trace fails: KeyError {error}")
PYTHON
as_it_is=$("$folder/venv/bin/python" "$folder/trace.py" plain)
mended=$("$folder/venv/bin/python" "$folder/trace.py" mended)
printf '%s\n' "as it is: $as_it_is" "without is_wrapped: $mended"
[ "$as_it_is" = "the next trace fails: KeyError 'torch.nn.functional.interpolate'" ]
[ "$mended" = "the next trace works" ]
