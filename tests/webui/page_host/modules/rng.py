"""Where a WebUI keeps its seeded noise; nothing on the page asks for any."""
