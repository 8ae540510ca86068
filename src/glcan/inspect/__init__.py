"""Somebody's model, looked at and not changed."""
