"""Existing models made faster or safer without training."""
