"""Pages for the people who run the gateway, on a port of their own that clients never reach."""
