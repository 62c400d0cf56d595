"""The FLAME paper's experiments: what is run (``experiments``), how (``runs``, ``peers``), and what comes of it."""
