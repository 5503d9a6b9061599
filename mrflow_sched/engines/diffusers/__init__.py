"""diffusers pipelines as engines."""
