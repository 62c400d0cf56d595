"""The FLAME paper's experiments.

What is run (``experiments``), how it is run (``runs``, ``peers``), and tables and plots of the results (``report``).
"""
