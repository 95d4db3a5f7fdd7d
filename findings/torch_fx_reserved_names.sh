#!/usr/bin/env bash
# torch.fx: a network whose layer, parameter or buffer has the name of a member of `GraphModule` traces without a word, or
# fails where nothing points to the name. The traced copy takes the attribute over and then looks for its own member:
#   a layer called `graph`: TypeError, "cannot assign 'torch.fx.graph.Graph' as child module 'graph'", at the trace;
#   a layer called `code`: the trace succeeds, and its call fails, TypeError "'str' object is not callable";
#   a buffer called `code`: RuntimeError, "Code has not been generated! Please report a bug to PyTorch";
#   a layer called `delete_submodule`, or any other method: the trace succeeds, and its call runs the method.
# The network itself works in all four cases, and so does the same layer with another name.
# Seen with torch 2.14.1 on Python 3.11. Prints what happens and fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat > "$folder/names.py" <<'PYTHON'
import sys

import torch
from torch import fx, nn


class Network(nn.Module):
    def __init__(self, kind, name):
        super().__init__()
        self.attribute, self.kind = name, kind
        if kind == "layer":
            self.add_module(name, nn.Linear(2, 2))
        else:
            self.register_buffer(name, torch.ones(2))

    def forward(self, x):
        own = getattr(self, self.attribute)
        return own(x) if self.kind == "layer" else x + own


def outcome(kind, name):
    network, x = Network(kind, name), torch.ones(1, 2)
    expected = network(x)
    try:
        traced = fx.symbolic_trace(network)
    except Exception as error:
        return f"the trace fails: {type(error).__name__}: {error}"
    try:
        return "works" if torch.equal(traced(x), expected) else "another result"
    except Exception as error:
        return f"the call fails: {type(error).__name__}: {error}"


print(outcome(*sys.argv[1:]))
PYTHON
check() {
    found=$("$folder/venv/bin/python" "$folder/names.py" "$1" "$2" 2> /dev/null | head -n 1)
    printf '%s\n' "$1 $2: $found"
    case "$found" in "$3"*) ;; *) exit 1 ;; esac
}
check layer encoder "works"
check buffer mask "works"
check layer graph "the trace fails: TypeError: cannot assign 'torch.fx.graph.Graph' as child module 'graph'"
check layer code "the call fails: TypeError: 'str' object is not callable"
check buffer code "the trace fails: RuntimeError: Code has not been generated! Please report a bug to PyTorch"
check layer delete_submodule "the call fails: TypeError: split_with_sizes()"
