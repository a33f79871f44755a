"""Compare a teacher with its student, and measure images against real ones."""
