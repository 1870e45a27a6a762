"""Pictures from anywhere: which sources are allowed, and how they become upright RGB."""
