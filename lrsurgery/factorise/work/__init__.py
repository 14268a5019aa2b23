"""The decomposition of a checkpoint: jobs, their work folder, the output that is written from their pieces."""
