"""Helpers that know no model: checks of values, files and crash-safe stores, statistics, processes, HTML.

This package imports nothing else of the project; every other package may import from it.
"""
