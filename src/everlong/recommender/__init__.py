"""What people use: fit, recommend, update, save, load."""
