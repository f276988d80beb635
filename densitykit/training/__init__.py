"""One way to train, to resume and to watch."""
