"""What `hiveminer COMMAND` runs, besides the miner and the validator."""
