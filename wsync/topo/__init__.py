"""The topology checker: what links a machine's GPUs and NICs, whether that is as it should be, and what follows."""
