"""Backbones, learning methods, statistics fitting, evaluation and the site agent."""
