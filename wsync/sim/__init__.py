"""The cluster simulator: a plan, event by event, on machines that need not exist."""
