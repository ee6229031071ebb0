"""What a long-running program needs: signals, locks, logs, metrics, events."""
