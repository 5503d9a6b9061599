"""The extension for WebUIs of the A1111 family: the modules that `scripts/mrflow.py` delegates to.

`controls` holds what the user chose, `host` what this host and model can do, `recipe` all numbers of a job. `run` is
the life of a job, with `job` (its state), `replacements` (methods that replace the host's), `encode` (the VAE) and
`reporting` (what a job says). `infotext` writes and reads metadata; `ui`, `axes`, `settings`, `upscaler` and `api`
extend the host's page and API. Each module can be imported without a host.
"""
