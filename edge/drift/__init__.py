"""Whether the line is still what the model was made for: parts, and apart from them camera and light.

condition (edgeflame) -> detector (evidence) -> monitor (one camera with one model) -> watcher (a thread and a file)
"""
