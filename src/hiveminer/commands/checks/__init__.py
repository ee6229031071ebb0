"""The checks of `hiveminer doctor`, by subject."""
