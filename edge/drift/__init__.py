"""Drift: whether parts, and apart from them camera and light, are still as they were when the model was fitted.

edgeflame.drift_reference (streams of measurements) ──> monitor (evidence and status) ──> watcher (a thread and a file)
"""
