"""Operators: a readable reference beside each fast form, proved equal by tests."""
