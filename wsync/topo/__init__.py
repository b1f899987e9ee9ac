"""The topology checker: what links the GPUs and NICs of a machine, whether that is as it should be, and what follows."""
