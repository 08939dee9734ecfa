"""The command line: ``grains-tl COMMAND``.

It imports from every package, when a command runs; nothing imports from it.
"""
