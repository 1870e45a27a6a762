"""Synthetic referring scenes with exact masks."""
