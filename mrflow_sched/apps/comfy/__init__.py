"""Nodes for ComfyUI: the core behind its sockets. The repository's root `__init__.py` is the door.

`inputs` has every input once; `nodes` are those of one part each, `expanding` those of a whole run, `demo` the embedded
model's, `extension` the list of all. `parts` does the work; `planned` is what travels between nodes; `family` finds out
what model is loaded; `host` asks ComfyUI's objects. ComfyUI samples, decodes and encodes: nothing of ours runs a
network.
"""
