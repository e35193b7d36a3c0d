"""What the store knows of a key in addition to its value: deadlines, chains, owners, departures."""
