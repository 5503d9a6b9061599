"""Benches of drafts and previews."""
