"""The `mrflow` command: one file for each subcommand."""
