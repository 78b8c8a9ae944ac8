"""Talking to a policy in the terminal."""
