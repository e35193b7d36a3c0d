"""What the daemon tells an operator: metrics and their port, the status page, spans, log lines."""
