"""Metrics, data sets and benchmarks of referring segmentation."""
