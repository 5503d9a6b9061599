"""Many images from a table of prompts: what is made, by whom, and how it is kept exactly once.

`table` reads the rows, `items` gives every image its key, `store` keeps files and the manifest, `pool` and `ray_pool`
are the workers, and `schedule` hands the work out. None of them knows a model: what a worker does is given to it.
"""
