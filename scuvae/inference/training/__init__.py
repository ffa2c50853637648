"""Fitting a model and every q: start, train, finish."""
