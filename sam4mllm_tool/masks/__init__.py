"""Masks of one image: relations, polygons, files, and other libraries' values."""
