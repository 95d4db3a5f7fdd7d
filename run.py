"""`block-admm` in a clone: python run.py experiment=<name> [key=value ...]; --help shows all keys."""

from experiments.run import main

if __name__ == "__main__":
    main()
