"""Whether the line is still what the model was made for: parts, and apart from them camera and light.

condition (edgeflame) -> monitor (evidence, and what is said of it) -> watcher (a thread and a file)
"""
