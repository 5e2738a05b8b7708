"""Completions without another engine: paged keys and values, continuous batching, the weights that are trained."""
