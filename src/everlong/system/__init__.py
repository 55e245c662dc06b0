"""What knows nothing of recommendation: files, settings, progress, provenance, Ctrl-C."""
