"""Groups of a run's settings that take a file of their own."""
