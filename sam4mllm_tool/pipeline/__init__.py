"""The flow from an image and an expression to masks; start reading in ``model.py``."""
