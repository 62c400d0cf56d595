"""Statistics of embeddings, in numpy.

Moments accumulate and merge; a Gaussian per position or a memory of prototypes scores; the codec is the package's
member; merging pools what sites share.
"""
