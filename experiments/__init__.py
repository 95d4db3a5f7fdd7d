"""The reproduction suite: what to run, where results are kept, figures and tables."""

try:
    from experiments.paths import expand_in_configurations
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is missing, which is installed by: pip install 'block-admm[suite]'", name=error.name
    ) from error

expand_in_configurations()
