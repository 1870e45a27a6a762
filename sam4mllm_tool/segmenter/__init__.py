"""Segmenters: SAM and its relatives behind one protocol."""
