"""Export as a graph that another runtime runs, its layers still low rank."""
