"""Training: the pure step and its schedules, and the shell that runs it on devices and keeps its results."""
