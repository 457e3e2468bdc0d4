"""Recipes: `litzoo fit --config NAME` finds NAME.yaml here."""
