"""What staged sampling costs in quality, by kind of picture, on scenes that are known exactly: see __main__.py."""
