"""Helpers that know no model: checks of values, files, statistics, processes."""
