#!/usr/bin/env bash
# One override, two searches: `x=range(1,3)` is 1 and 2 in a grid of Hydra's own sweeper, and 1, 2 and 3 in a study of its
# Optuna plugin, which takes the end for one of the values. A grid and a study of the same command line do not search the
# same space.
# Seen with hydra-core 1.3.8, hydra-optuna-sweeper 1.3.0, optuna 2.10.1 on Python 3.11. Prints both and fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet hydra-core==1.3.8 hydra-optuna-sweeper==1.3.0 optuna==2.10.1 'sqlalchemy<2' 'setuptools<81'
cat > "$folder/job.py" <<'PYTHON'
import hydra


@hydra.main(version_base="1.3", config_path=None)
def main(config):
    with open("values.txt", "a") as file:
        file.write(f"{config.x}\n")
    return 0.0


main()
PYTHON
values() {
    cd "$folder"
    rm -f values.txt
    venv/bin/python job.py -m '+x=range(1,3)' "$@" > log.txt 2>&1 || { cat log.txt; exit 1; }
    sort -u values.txt | tr '\n' ' '
}
grid=$(values)
study=$(values hydra/sweeper=optuna hydra.sweeper.n_trials=30 hydra.sweeper.sampler.seed=1)
echo "grid: $grid"
echo "study: $study"
[ "$grid" = "1 2 " ] && [ "$study" = "1 2 3 " ]
