"""The `mrflow` command: a file for every command."""
