"""Private interfaces of other libraries, one file per library."""
