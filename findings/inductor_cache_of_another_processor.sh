#!/usr/bin/env bash
# torch.compile keeps on the disk what it has compiled for a processor, and the key of the entry does not name the processor's vector
# instructions. A process with narrower vectors that shares the folder (TORCHINDUCTOR_CACHE_DIR on a cluster's network disk, an image, or
# PyTorch's own ATEN_CPU_CAPABILITY=avx2 on the same machine) takes the entry, whose C++ loops step by the vectors of the former one, and
# compiles it for its own: a part of the result is never written. There is no error and no warning. With a tag of the processor's
# capability in torch.compiler.config.cache_key_tag the entries are kept apart.
# Seen with torch 2.14.1 on Python 3.11, x86-64 Linux with AVX-512 and g++ 12. Prints the errors and fails if that changes.
set -euo pipefail
grep -q avx512f /proc/cpuinfo || { echo "needs a processor with AVX-512"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat > "$folder/tanh.py" <<'PYTHON'
import sys

import torch

x = torch.linspace(-1, 1, 12, dtype=torch.float64)
capability = torch.backends.cpu.get_cpu_capability()
if sys.argv[1] == "tagged":
    torch.compiler.config.cache_key_tag = capability
right = torch.isclose(torch.compile(torch.tanh)(x), torch.tanh(x))
print(f"torch {torch.__version__}, {capability}, {sys.argv[1]}: {int(right.sum())} of 12 numbers are right")
wrong = sys.argv[1:] == ["shared", "second"]
sys.exit(bool(right.all()) == wrong)
PYTHON
for key in shared tagged; do
  export TORCHINDUCTOR_CACHE_DIR="$folder/cache-$key"
  "$folder/venv/bin/python" "$folder/tanh.py" "$key" first
  ATEN_CPU_CAPABILITY=avx2 "$folder/venv/bin/python" "$folder/tanh.py" "$key" second
done
