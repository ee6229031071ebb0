"""What work is worth: replays, loss curves and scores."""
