"""Trained weights that ship with litzoo; `index.json` lists them."""
