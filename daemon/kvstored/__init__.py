"""kvstored: the daemon and its command line. Importing it imports nothing heavy: the CLI starts from here."""
