"""Benches of drafts and previews, one section a file (`python -m bench.previews`)."""
