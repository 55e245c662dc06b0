"""The contract of a model, and the models: one file each."""
