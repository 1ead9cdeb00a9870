"""A server that runs somewhere → whether it says what the checkpoint says."""
