"""WHEN: jobs, schedules, sensors, and the `ratchet` command."""
