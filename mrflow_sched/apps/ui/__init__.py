"""`mrflow ui`: a page in the browser, served on this machine only, to try the method without a WebUI host.

`page` lays it out and connects it, `choices` is what its controls ask for, `work` makes images, `jobs` runs one job at
a time, `given` reads what is dropped onto it, `words` is what it says, `serve` is the server. `studio` is what the
command line hands over: the loaded model, and how results are saved and checked. Only `page` and `serve` use gradio and
its server.
"""
