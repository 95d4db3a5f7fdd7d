"""DeepFacto (paper, §3.4): non-negative matrix factorisation inside a network."""
