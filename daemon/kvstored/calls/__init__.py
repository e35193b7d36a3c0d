"""What a call does, by whichever door it came: puts, gets, the small verbs, and bytes in flight."""
