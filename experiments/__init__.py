"""The reproduction suite: what to run, where results are kept, figures and tables."""

from experiments.paths import expand_in_configurations

expand_in_configurations()
