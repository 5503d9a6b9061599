"""Methods: how a stage is sampled and how one stage becomes the next, one file each."""
