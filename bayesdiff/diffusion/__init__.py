"""The forward process and what networks predict of it."""
