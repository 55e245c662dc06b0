"""What runs: shards, the live model, and answers to requests."""
