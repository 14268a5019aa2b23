"""Training and measuring without a task: inputs without labels, and agreement with the outputs of a teacher."""
