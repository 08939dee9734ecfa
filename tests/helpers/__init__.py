"""Models, oracles and servers that several tests use."""
