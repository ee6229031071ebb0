"""What the user says: settings of this machine, and the run that all share."""
