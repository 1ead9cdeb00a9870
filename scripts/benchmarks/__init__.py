"""Time, quality and size of converted models, beside what they came from and beside rivals."""
