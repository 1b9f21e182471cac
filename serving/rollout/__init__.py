"""A second release on a channel: how much traffic it gets, and what decides about it."""
