"""The rivals as published, recomputing what their authors recompute: the other side of the benchmark."""
