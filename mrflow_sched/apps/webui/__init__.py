"""The extension for WebUIs of the A1111 family: rooms that `scripts/mrflow.py` delegates to.

`controls` what the user chose, `host` what this host and model can do, `recipe` all numbers of a job, `run` the life
of a job, `infotext` metadata; `ui`, `axes`, `settings`, `upscaler` and `api` face the host's page. No room needs a host
to be imported.
"""
