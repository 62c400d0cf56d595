"""A fleet's identities: its certificate authority, the broker's access rules, and the kits that sites are given."""
