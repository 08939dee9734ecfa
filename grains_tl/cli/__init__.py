"""The command line: ``grains-tl COMMAND``."""
