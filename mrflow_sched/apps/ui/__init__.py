"""`mrflow ui`: a page in the browser, served on this machine only, to try the method without a WebUI host.

`layout` has its controls, `page` what happens when one is used, `choices` is what they ask for, `work` makes images,
`jobs` runs one job at a time, `given` reads what is dropped onto it, `words` is what it says, `serve` is the server.
`studio` is what the command line hands over: the loaded model, and how results are saved and checked. Only `layout`,
`page` and `serve` use gradio and its server.
"""
