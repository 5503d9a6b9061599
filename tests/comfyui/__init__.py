"""The nodes in a real ComfyUI. A package, so that its fixtures have a file of their own beside those of all tests."""
