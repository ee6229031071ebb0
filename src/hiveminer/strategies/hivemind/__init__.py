"""The strategy `hivemind`: local steps and averaged parameters, made safe among strangers."""
