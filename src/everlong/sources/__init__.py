"""Where logs come from: synthetic ones with a known best score."""

from everlong.sources.synthetic import SyntheticLog, demo_log, long_dependency, markov_chain

__all__ = ["SyntheticLog", "demo_log", "long_dependency", "markov_chain"]
