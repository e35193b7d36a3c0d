"""The parts of `bench/soak.py`: what values say of themselves, what is known of keys, workers, faults, the daemon."""
