"""The built-in models that recipes name, one family a file."""
