"""Packages on their way to the lines that run them: announced, served, and what each line made of them."""
