"""Metrics, intervals, and the measurement of models."""
