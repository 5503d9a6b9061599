"""Quality of staged sampling by kind of image, on scenes that are known exactly: see __main__.py."""
