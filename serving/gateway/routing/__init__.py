"""Which upstream answers: choice, retries, failover and circuit breaking. See docs/routing.md."""
