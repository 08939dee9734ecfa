"""Ratios measured in one process; see each module's docstring."""
