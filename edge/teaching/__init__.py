"""Teaching: a new product is set up at the line, from its own camera's pictures.

:mod:`edge.teaching.teacher` is where orders arrive; :mod:`edge.teaching.record` keeps what has come of them.
"""
