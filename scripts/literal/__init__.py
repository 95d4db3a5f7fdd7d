"""The algorithms as printed, line by line; the tests compare with them, and the benchmark measures against them."""
