"""What people use: `MrFlow` for a loaded pipeline, the command line, the WebUI extension."""
