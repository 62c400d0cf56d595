"""A fleet on one machine: the real rounds and the real sites, without a network between them."""
