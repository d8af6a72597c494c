"""One function a command, grouped by what they work on; `hqc/cli.py` lists them."""
