"""Figures from arrays, used by callbacks and by the command line."""
