#!/usr/bin/env bash
# One failed job takes the end of a sweep away from all: of three jobs the second raises, the first and the third finish,
# and Hydra calls no callback's `on_multirun_end` (which it does without the failure), so that what a callback would make of
# the finished jobs is not made. A job that ends by SystemExit ends the sweep itself: the third job never runs.
# Seen with hydra-core 1.3.8 on Python 3.11. Prints what ran and fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet hydra-core==1.3.8
mkdir "$folder/conf"
cat > "$folder/conf/config.yaml" <<'YAML'
x: 0
how: none
hydra:
  callbacks:
    end:
      _target_: callback.End
YAML
cat > "$folder/callback.py" <<'PYTHON'
from hydra.experimental.callback import Callback


class End(Callback):
    def on_multirun_end(self, config, **kwargs):
        print("end of the sweep", flush=True)
PYTHON
cat > "$folder/job.py" <<'PYTHON'
import hydra


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config):
    if config.x == 2 and config.how == "exception":
        raise ValueError("the second job")
    if config.x == 2 and config.how == "exit":
        raise SystemExit("the second job")
    print(f"job {config.x}", flush=True)


main()
PYTHON
printed() {
    cd "$folder"
    PYTHONPATH=. venv/bin/python job.py -m x=1,2,3 "how=$1" 2> /dev/null | grep -E '^(job|end)' | tr '\n' ';' || true
}
none=$(printed none)
exception=$(printed exception)
exit=$(printed exit)
printf '%s\n' "no failure: $none" "exception: $exception" "SystemExit: $exit"
[ "$none" = "job 1;job 2;job 3;end of the sweep;" ]
[ "$exception" = "job 1;job 3;" ]
[ "$exit" = "job 1;" ]
