"""The folder of a run: its configuration, cases, checkpoints and logs."""
