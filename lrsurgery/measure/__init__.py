"""Quality, speed, memory, grids of runs."""
