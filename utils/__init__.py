"""Training and evaluation, checkpoints, logs, seeds, devices."""
