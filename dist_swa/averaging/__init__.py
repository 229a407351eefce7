"""Averages of local shards: rules, in-place updates, and the average of a model."""
