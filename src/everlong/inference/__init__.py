"""From histories to states, and from states to lists."""
