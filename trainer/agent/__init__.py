"""A site's part in federated rounds: the protocol side, and the worker process it keeps the training in."""
