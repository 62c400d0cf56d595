"""A folder that somebody else writes images into: each complete file is one part, once."""
