"""Real INT8 arithmetic on a CPU."""
