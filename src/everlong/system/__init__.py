"""Infrastructure without recommendation logic: files, settings, progress, provenance, signals."""
