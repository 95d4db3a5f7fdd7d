#!/usr/bin/env bash
# After torch.set_flush_denormal(True), which speeds up training where moments have decayed to denormal numbers, Matplotlib labels
# a logarithmic axis that starts at 1 in another way: minor ticks get labels, such as 3x10^0, which may lie on others. Its formatter
# counts the powers of ten of the axis by the next number below log10(1) = 0, which is denormal, and finds one fewer.
# Seen with torch 2.14.1, matplotlib 3.11.2 on Python 3.11, x86-64 Linux. Prints the labels and fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy matplotlib==3.11.2
cat > "$folder/labels.py" <<'PYTHON'
import matplotlib
import torch
from matplotlib.figure import Figure


def minor_labels(flush):
    torch.set_flush_denormal(flush)
    axes = Figure().subplots()
    axes.semilogx([1, 45], [0, 1])
    axes.set_xlim(1, 45)
    axes.figure.draw_without_rendering()
    return [label.get_text() for label in axes.get_xticklabels(minor=True) if label.get_text()]


plain, flushed = minor_labels(False), minor_labels(True)
print(f"torch {torch.__version__}, matplotlib {matplotlib.__version__}: {len(plain)} minor labels, flushed {flushed}")
assert not plain and flushed
PYTHON
"$folder/venv/bin/python" "$folder/labels.py" 2> /dev/null
