"""Releases to running engines and channels, and back."""
