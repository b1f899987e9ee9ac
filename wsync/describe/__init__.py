"""Manifests from model configs, checkpoint headers and parallel layouts, without running the job."""
