"""Training and measurement of the embedded SAM from scratch."""
