"""The main job on bundled data, from records to a written report: ``grains-tl demo``."""
