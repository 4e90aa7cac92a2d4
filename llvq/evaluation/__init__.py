"""Evaluation: metrics over whole splits, codes counted, pictures."""
