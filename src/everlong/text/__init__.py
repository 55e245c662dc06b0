"""From the text of an item to its vector."""
