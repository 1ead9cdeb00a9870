"""What a release takes: pages from figures, and the name of the shipped code."""
