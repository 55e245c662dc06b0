"""From a log to events, splits and batches."""
