"""The service: events in, recommendations out, nothing lost."""
