"""FedDyMem: sites share a dynamic memory of normal patches, not weights (Chen et al. 2025, arXiv 2502.21012).

Only the paper's abstract was available: what it leaves open is our reading of it, see docs/methods.md.
"""
