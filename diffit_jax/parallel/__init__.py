"""Devices: the mesh, and which array lies where on it."""
