"""The algorithms as printed, line by line: what the tests compare with, and the benchmark measures against."""
