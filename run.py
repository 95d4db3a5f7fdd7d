"""`block-admm` in a clone: python run.py experiment=<name> [key=value ...]; --help shows all keys."""

from experiments.command import main

if __name__ == "__main__":
    main()
