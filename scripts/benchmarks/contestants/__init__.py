"""What `scripts.benchmarks.worker` times: one file per kind of contestant, of which `prepare(spec)` returns a chunk."""
