"""The tools that agents call: registry, schemas, texts, coordinates, workspace."""
