"""What takes absorb to its limits: damaged inputs, kills, and the whole way to a Hub."""
