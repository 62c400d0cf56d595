"""What runs the scoring graph on the line."""

from edge.runtimes.interface import Device, Runtime, Scores, check_runtime_fits, open_runtime

__all__ = ["Device", "Runtime", "Scores", "check_runtime_fits", "open_runtime"]
