"""What is kept: the event log and the states that follow from it."""
