"""Figures and tables, pure functions of the results store and of what an experiment declares."""
