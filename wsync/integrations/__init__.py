"""Plug-ins and drivers for serving frameworks: what is built on `Source` and `Sink` and knows a framework's control."""
