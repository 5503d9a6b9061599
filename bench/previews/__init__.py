"""Measures drafts and previews on the embedded model, one section a file."""
