"""The process and its machine: limits and locks, memory given back, memory pressure, systemd."""
