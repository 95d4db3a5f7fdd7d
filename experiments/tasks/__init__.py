"""What one job of a launch can do: train a classifier or DeepFacto, race methods against the clock, measure memory."""
