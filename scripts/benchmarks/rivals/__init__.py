"""What one would do about outliers instead of absorbing them."""
