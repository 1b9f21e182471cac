"""ONLINE: what stands in front of people. Reached as processes; nothing imports it."""
