"""Pages for people: one HTML file each, with its pictures, curves and style inside, so that it opens from anywhere."""
