#!/usr/bin/env bash
# PyTorch's counter of floating-point operations, torch.utils.flop_counter.FlopCounterMode, counts 0 for layers that PyTorch
# evaluates by a fused kernel, without a warning: on a CPU for nn.LSTM (1,188 for nn.GRU of the same sizes, 1,584 for the LSTM
# once oneDNN is off), and for nn.TransformerEncoderLayer in evaluation mode without gradients (4,608 in training mode). A cost
# model, or a share of peak, that is made of these numbers is wrong by the whole layer.
# Seen with torch 2.14.1 on Python 3.11. Prints what is counted and fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def counted(module, x, training=False):
    module.train(training)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        module(x)
    return counter.get_total_flops()


steps = torch.zeros(3, 1, 5)
lstm, encoder = nn.LSTM(5, 6), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
found = {
    "LSTM": counted(lstm, steps),
    "GRU": counted(nn.GRU(5, 6), steps),
    "encoder layer in training": counted(encoder, torch.zeros(1, 4, 8), training=True),
    "encoder layer in evaluation": counted(encoder, torch.zeros(1, 4, 8)),
}
with torch.backends.mkldnn.flags(enabled=False):
    found["LSTM without oneDNN"] = counted(lstm, steps)
print(torch.__version__, found)
assert list(found.values()) == [0, 1188, 4608, 0, 1584]
PYTHON
