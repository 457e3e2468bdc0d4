"""Modules that are parts of models."""
