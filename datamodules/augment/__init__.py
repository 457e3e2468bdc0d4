"""Batched augmentation: parameters are drawn per sample, from the keys of the batch."""
