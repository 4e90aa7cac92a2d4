"""Devices, processes, signals and the console."""
