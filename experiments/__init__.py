"""The reproduction suite: what to run, where results are kept, figures and tables."""
